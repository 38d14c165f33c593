"""`wire: auto`: for each client the cheapest codecs whose effect, measured on its text, is within the budget.

    held-out batches --the run's own evaluation, through each codec in turn--> rise of perplexity    hidden
    gradient at the last hidden states --through each codec--> error of a layer's gradient          gradient

The real model, the client's real text and its cut; no hidden states that the first evaluation does not send
too. Gradients may cause half of the budget, and hidden states what is left: their mean rise over batches and
its standard error must be within it. Losses of a few batches differ by luck more than the budget, so the rise
is taken from all predictions: the divergence of those through the codec from those without, less the
divergence of those from hidden states shaken by their own last digit, for rounding in the model does that
much by itself. With `labels: server`, which has no predictions to compare, losses are compared after all.

Of gradients a loss cannot show the effect before there is training: an error of relative energy w in a
layer's gradient leaves 1 / (1 + w) of a step's descent (as variance does in QSGD, arXiv 1610.02132), and
fine-tuning is taken to have EXPECTED_GAIN nats to gain. Two legs carry gradients, so w counts twice.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from splitft.codecs import CodecContext, codec_of
from splitft.model import divergence
from splitft.protocol import Activations, HeldOutLoss, LastHidden, MessageSerializer, expect
from splitft.protocol.channel import Channel
from splitft.specs import WireSpec
from splitft.specs.codecs import kind_of
from splitft.specs.wire import AUTO
from splitft.tracking.events import WireChosen
from splitft.training import Client, Server

HIDDEN = ("principal", "principal:bits=3", "int4", "int8", "bf16")
"""Candidates for hidden states, from the fewest bytes on; the last is taken if nothing else fits."""
GRADIENT = ("int2", "int4", "int8", "bf16")
"""Candidates for gradients likewise."""
MEASURED = 4
"""Held-out batches that effects are measured on, at most; the others teach codecs that learn."""
SHAKEN = 16
"""One number in so many is shaken; more make no difference, for the model spreads it to all."""
EXPECTED_GAIN = 0.5
"""Nats that fine-tuning is expected to lower the loss by."""


@dataclass(frozen=True)
class CodecTrial:
    """One candidate on one client."""

    codec: str
    rise: float
    """Estimated rise of perplexity, as a share."""
    error: float
    """Its standard error; 0 where it is not a mean."""
    fits: bool

    def __str__(self) -> str:
        return f"{self.codec} {100 * self.rise:+.2f} %" + (
            f" (+- {100 * self.error:.2f})" if self.error else ""
        )


def choose_wires(
    clients: Sequence[Client], server: Server, terms: MessageSerializer
) -> tuple[dict[str, WireSpec], tuple[WireChosen, ...]]:
    """The wire of each client, and what to tell the user; some seconds for each client."""
    server.place({client.name: client.plan.client.stop for client in clients})
    server.install(server.initial())
    wires, told = {}, []
    for client in clients:
        wire, trials = terms.wire, _trials(client, server, terms)
        chosen = {role: _fitting(tried).codec for role, tried in trials.items()}
        wires[client.name] = wire = wire.model_copy(update=chosen)
        told.append(
            WireChosen(
                client=client.name, hidden=wire.hidden, gradient=wire.gradient, reason=_reason(wire, trials)
            )
        )
    return wires, tuple(told)


def _trials(client: Client, server: Server, terms: MessageSerializer) -> dict[str, list[CodecTrial]]:
    """By role; hidden states may cause what gradients leave of the budget."""
    wire, left = terms.wire, terms.wire.budget
    trials: dict[str, list[CodecTrial]] = {}
    if wire.gradient == AUTO:
        allowed = left / 2 if wire.hidden == AUTO else left
        trials["gradient"] = _gradient_trials(client, server, terms, allowed)
        left -= _fitting(trials["gradient"]).rise
    if wire.hidden == AUTO:
        trials["hidden"] = _hidden_trials(client, server, terms, left)
    return trials


def _hidden_trials(
    client: Client, server: Server, terms: MessageSerializer, allowed: float
) -> list[CodecTrial]:
    """Candidates until one fits."""
    count = min(MEASURED, max(1, len(client.held_out) // 2))
    exact = _replies(client, server, _with(terms, "fp32"), count)
    shaken = _replies(client, server, _with(terms, "fp32"), count, shaken=True)
    trials: list[CodecTrial] = []
    for codec in HIDDEN[:-1]:
        found = _replies(client, server, _with(terms, codec), count)
        if not found:  # too little text to learn axes from: what was measured was not the codec
            continue
        rises = [_rise(client, *replies) for replies in zip(exact, found, shaken, strict=True)]
        rise = statistics.fmean(rises)
        error = statistics.stdev(rises) / math.sqrt(len(rises)) if len(rises) > 1 else 0.0
        trials.append(CodecTrial(codec, rise, error, abs(rise) + error <= allowed))
        if trials[-1].fits:
            return trials
    return [*trials, CodecTrial(HIDDEN[-1], 0.0, 0.0, True)]


def _replies(
    client: Client, server: Server, terms: MessageSerializer, count: int, shaken: bool = False
) -> list[LastHidden | HeldOutLoss]:
    """What comes back of the first batches, after the others taught the codec; none if it did not learn."""
    line = Channel(client.name, terms)
    learned = kind_of(terms.wire.hidden).learned
    if learned is not None:
        for index in range(count, len(client.held_out)):
            _reply(client, server, line, index)
        remembered = (line.ends["client"].tensors(), line.ends["server"].tensors())
        legs = 1 if terms.labels_travel else 2
        if any(sum(key.endswith(f"/{learned}") for key in tensors) < legs for tensors in remembered):
            return []
    return [_reply(client, server, line, index, shaken) for index in range(count)]


def _reply(
    client: Client, server: Server, line: Channel, index: int, shaken: bool = False
) -> LastHidden | HeldOutLoss:
    sent = client.held_out.forward(index)
    if shaken:
        sent = sent.model_copy(update={"hidden": _shaken(sent.hidden)})
    arrived = expect(line.up(sent), Activations)
    return expect(line.down(server.forward([arrived])[client.name]), LastHidden, HeldOutLoss)


def _shaken(hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states (N, D), one number in `SHAKEN` moved by its last digit."""
    flat = hidden.flatten().clone()
    some = flat[::SHAKEN]
    flat[::SHAKEN] = torch.nextafter(some, torch.full_like(some, math.inf))
    return flat.reshape(hidden.shape)


def _rise(
    client: Client,
    exact: LastHidden | HeldOutLoss,
    found: LastHidden | HeldOutLoss,
    shaken: LastHidden | HeldOutLoss,
) -> float:
    """Rise of one batch's perplexity, as a share."""
    if isinstance(exact, LastHidden) and isinstance(found, LastHidden) and isinstance(shaken, LastHidden):
        by_codec, by_itself = (
            divergence(client.segment, exact.hidden, one.hidden) for one in (found, shaken)
        )
        return math.expm1(by_codec - by_itself)
    exact, found = expect(exact, HeldOutLoss), expect(found, HeldOutLoss)
    return math.expm1((found.loss - exact.loss) / max(1, exact.tokens))


def _gradient_trials(
    client: Client, server: Server, terms: MessageSerializer, allowed: float
) -> list[CodecTrial]:
    """Candidates until one fits; without the head on the client nothing is measured, and int8 is taken."""
    if terms.labels_travel:
        return [CodecTrial("int8", 0.0, 0.0, True)]
    reply = expect(_reply(client, server, Channel(client.name, _with(terms, "fp32")), 0), LastHidden)
    gradient = client.held_out.gradient(reply).float()
    inputs = reply.hidden.float()
    inputs = inputs / inputs.norm(dim=1, keepdim=True).clamp_min(1e-30)  # as behind a norm
    wanted = gradient.T @ inputs
    trials: list[CodecTrial] = []
    for name in GRADIENT[:-1]:
        codec, passage = codec_of(name), CodecContext("gradient", 0, {})
        rounded = codec.decode(codec.encode(gradient, passage), torch.float32, passage)
        noise = 2 * float(
            (rounded.T @ inputs - wanted).square().sum() / wanted.square().sum().clamp_min(1e-30)
        )
        rise = math.expm1(EXPECTED_GAIN * noise / (1 + noise))
        trials.append(CodecTrial(name, rise, 0.0, rise <= allowed))
        if trials[-1].fits:
            return trials
    return [*trials, CodecTrial(GRADIENT[-1], 0.0, 0.0, True)]


def _fitting(trials: Sequence[CodecTrial]) -> CodecTrial:
    return next(trial for trial in trials if trial.fits)


def _reason(wire: WireSpec, trials: Mapping[str, Sequence[CodecTrial]]) -> str:
    tried = "; ".join(f"{role}: {', '.join(map(str, found))}" for role, found in trials.items())
    return f"estimated rise of perplexity, {100 * wire.budget:.2f} % allowed in all: {tried}"


def _with(terms: MessageSerializer, hidden: str) -> MessageSerializer:
    """The same terms with this codec for hidden states, and gradients that are not rounded."""
    return replace(terms, wire=terms.wire.model_copy(update={"hidden": hidden, "gradient": "fp32"}))
