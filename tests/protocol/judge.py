"""A judge of what becomes of mutated frames: a typed refusal or a message that could have been sent.

    good frame --mutation--> bytes --from_bytes--> error | message --fault_of--> what is wrong with it

Whether an accepted message is good is judged by rules written here anew, not by those of the code. Time and
memory are judged too: nothing of some kB may take seconds, or allocate more than it could ever need.
"""

from __future__ import annotations

import math
import random
import time
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from protocol.mutations import MUTATIONS, Mutation
from splitft.adapters import AdapterState, Factors
from splitft.codecs import CODECS
from splitft.errors import SplitftError
from splitft.protocol import (
    Activations,
    AdapterUpload,
    CutGradient,
    Evaluation,
    GlobalAdapters,
    HeadGradient,
    HeldOutLoss,
    LastHidden,
    Message,
    MessageSerializer,
    RoundReady,
    RoundStart,
)
from splitft.specs import WireSpec

WIDTH = 64
SLOWEST_S = 2.0
"""A frame of these sizes that takes longer hangs."""
MOST_BYTES = 16 * 2**20
"""What reading one of these frames, of some kB, may allocate."""


def _numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def _messages() -> list[Message]:
    keys = [(0, "self_attn.q_proj"), (1, "self_attn.q_proj")]
    adapters = AdapterState({key: Factors(_numbers(2, WIDTH), _numbers(WIDTH, 2)) for key in keys})
    moments = {"1.q.A.exp_avg": _numbers(2, WIDTH), "1.q.A.step": torch.tensor(3.0)}
    sent = {"client": "a", "round": 1, "step": 2, "training": True, "lengths": (3, 2)}
    return [
        RoundStart(round=1, cut=2, adapters=adapters, moments=moments),
        RoundReady(client="a", round=1, moments=moments),
        Activations(**sent, labelled=((0, 2), (1, 2)), hidden=_numbers(5, WIDTH)),
        LastHidden(step=2, hidden=_numbers(3, WIDTH)),
        HeadGradient(client="a", round=1, step=2, loss=1.5, gradient=_numbers(3, WIDTH)),
        CutGradient(step=2, gradient=_numbers(5, WIDTH), loss=0.5),
        AdapterUpload(client="a", round=1, adapters=adapters),
        GlobalAdapters(round=1, adapters=adapters),
        HeldOutLoss(step=0, loss=12.5, tokens=9),
        Evaluation(client="a", round=0, loss=0.0, tokens=0),
    ]


def good_frames() -> list[tuple[MessageSerializer, bytes]]:
    """A frame of every kind, in every codec, with labels and without."""
    frames = []
    for name in CODECS:
        plain = MessageSerializer(
            WIDTH, torch.float32, torch.float32, WireSpec(hidden=name, gradient=name), most_rows=64
        )
        frames += [(plain, plain.to_bytes(message)) for message in _messages()]
    told = MessageSerializer(
        WIDTH, torch.float32, torch.float32, WireSpec(), labels_travel=True, most_rows=64
    )
    labelled = _messages()[2].model_copy(update={"labels": torch.tensor([7, 2**40, 0])})
    return [*frames, (told, told.to_bytes(labelled))]


def fault_of(message: Message, terms: MessageSerializer) -> str | None:
    """What is wrong with a message that was accepted, by the page's rules and not by the code's."""
    for name in type(message).model_fields:
        value = getattr(message, name)
        tensors = [value] if isinstance(value, torch.Tensor) else []
        if isinstance(value, AdapterState):
            tensors = list(value.tensors().values())
        elif isinstance(value, dict):
            tensors = list(value.values())
        for tensor in tensors:
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                return f"{name} is not finite"
            if tensor.numel() * tensor.dtype.itemsize > MOST_BYTES:
                return f"{name} takes {tensor.numel()} elements"
        if name in ("hidden", "gradient") and (value.dim() != 2 or value.shape[1] != terms.width):
            return f"{name} is {tuple(value.shape)}"
        if name == "loss" and value is not None and not math.isfinite(value):
            return "the loss is not finite"
        if name in ("round", "step", "tokens", "cut") and not 0 <= value < 2**63:
            return f"{name} is {value}"
    if isinstance(message, Activations):
        if message.hidden.shape[0] != sum(message.lengths) or len(message.labelled) != len(message.lengths):
            return "rows and lengths disagree"
        if any(not 0 <= a < b <= n for (a, b), n in zip(message.labelled, message.lengths, strict=True)):
            return "labelled positions outside of a sequence"
        if message.labels is not None:
            if not terms.labels_travel:
                return "labels came that stay at home"
            if len(message.labels) != sum(b - a for a, b in message.labelled):
                return "labels and positions disagree"
    return None


@dataclass
class Tally:
    """What became of the frames."""

    frames: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """By mutation."""
    accepted: Counter[str] = field(default_factory=Counter)
    """By mutation: forged frames that are good frames."""
    slowest_s: float = 0.0
    peak_bytes: int = 0
    """Most that the interpreter allocated for one frame, of those that were traced."""
    traced: int = 0


def attack(
    frames: Sequence[tuple[MessageSerializer, bytes]],
    count: int,
    seed: int,
    mutations: Sequence[Mutation] = MUTATIONS,
    trace_every: int = 20,
) -> Tally:
    """Read `count` mutated frames. Raises AssertionError for the first dealt with wrongly."""
    rng, tally = random.Random(seed), Tally()
    for number in range(count):
        terms, good = rng.choice(frames)
        mutate = mutations[number % len(mutations)]
        data, must_refuse = mutate(good, rng)
        if data == good:
            continue
        where = f"frame {number} of seed {seed}: {mutate.__name__} of {len(data)} bytes"
        traced = number % trace_every == 0
        if traced:
            tracemalloc.start()
        began = time.perf_counter()
        try:
            message: Message | None = terms.from_bytes(data)
        except SplitftError:
            message = None
        except Exception as error:
            raise AssertionError(
                f"{where}: {type(error).__name__} without a type of ours: {error}"
            ) from error
        spent = time.perf_counter() - began
        if traced:
            tally.traced += 1
            tally.peak_bytes = max(tally.peak_bytes, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert spent < SLOWEST_S, f"{where}: {spent:.1f} s"
        assert tally.peak_bytes < MOST_BYTES, f"{where}: {tally.peak_bytes} bytes allocated"
        tally.frames += 1
        tally.slowest_s = max(tally.slowest_s, spent)
        if message is None:
            tally.refused[mutate.__name__] += 1
            continue
        tally.accepted[mutate.__name__] += 1
        assert not must_refuse, f"{where}: accepted as {message!r:.200}"
        fault = fault_of(message, terms)
        assert fault is None, f"{where}: accepted, but {fault}"
    return tally
