"""Measure this machine: seconds per token of a real block of the chosen model, forward and backward.

    blocks [0, 4) with LoRA, (B, T) batches of two sizes --timed--> Device --cached per model and machine

The small batch gives a block's overhead, the large one what each token adds. Calibrating takes a few seconds;
the result is kept in the user's cache folder, so that planning is quick and simulated times are the same from
run to run. Medians are used, since other programs slow down single batches.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from splitft.adapters import LocalOptimizer, attach
from splitft.cache import KeyedCache, cache_folder
from splitft.geometry import Span
from splitft.model import Model, loss_and_gradient
from splitft.schedule.profile import Device
from splitft.specs import TrainingSpec
from splitft.training.ranks import RankPolicy

BLOCKS = 4
"""Blocks timed together; all blocks of a smaller model."""
SEQUENCES, LENGTH = 4, 128
"""Shape of the larger batch."""
FEW = 32
"""Tokens of the smaller batch, one sequence."""
SECONDS = 4.0
"""Time spent on blocks; the head takes half as long."""
SLOT = "calibration"


def measured(model: Model, ranks: RankPolicy, training: TrainingSpec) -> Device:
    """Return this machine's speed for this model: from the cache, or measured now."""
    cache = KeyedCache(
        cache_folder() / "calibrations",
        dump=lambda device: json.dumps(asdict(device)).encode(),
        load=lambda data: Device(**json.loads(data)),
    )
    return cache.cached(_facts(model, ranks), lambda: calibrate(model, ranks, training))


def calibrate(model: Model, ranks: RankPolicy, training: TrainingSpec) -> Device:
    """Time blocks and head now."""
    # blocks with adapters
    span = Span(0, min(BLOCKS, model.shape.blocks))
    length = min(LENGTH, model.shape.max_positions)
    segment = model.segment(span, embedding=True, head=True)
    bank = attach(segment.blocks, ranks.lora.targets, ranks.scale, model.dtype)
    layers = {key: size for key, size in bank.sizes.items() if key[0] in span}
    dtype = torch.promote_types(model.dtype, torch.float32)
    bank.put(SLOT, ranks.start(layers, dtype))
    optimizer = LocalOptimizer(bank.parameters(SLOT), training)
    generator = torch.Generator().manual_seed(ranks.seed)
    shapes = ((1, min(FEW, length)), (SEQUENCES, length))
    batches = [torch.randint(model.shape.vocab, shape, generator=generator) for shape in shapes]
    # a training step on each batch, repeated
    forward_s: list[list[float]] = [[], []]
    backward_s: list[list[float]] = [[], []]

    def step() -> None:
        for index, tokens in enumerate(batches):
            began = time.perf_counter()
            with torch.enable_grad(), bank.routed([(SLOT, len(tokens))]):
                hidden = segment.run(tokens, span)
            forward_end = time.perf_counter()
            torch.autograd.backward([hidden], [torch.ones_like(hidden) * 1e-3])
            optimizer.step()
            forward_s[index].append(forward_end - began)
            backward_s[index].append(time.perf_counter() - forward_end)

    _repeat(step, SECONDS)
    sizes_timed = [tokens.numel() for tokens in batches]
    forward, backward = (_fit_line(sizes_timed, times, len(span)) for times in (forward_s, backward_s))
    # head and loss
    rows = torch.randn(SEQUENCES * length, model.shape.width, generator=generator).to(model.dtype)
    targets = torch.randint(model.shape.vocab, (len(rows),), generator=generator)
    head_s = _repeat(lambda: loss_and_gradient(segment, rows, targets), SECONDS / 2)
    return Device(
        name="measured",
        block_forward_s_per_token=forward[1],
        block_backward_s_per_token=backward[1],
        block_overhead_s=(forward[0] + backward[0]) / 2,
        head_s_per_token=statistics.median(head_s[1:]) / len(rows),
        memory_bytes=_free_memory(),
        source=f"measured on this machine ({_machine()})",
    )


def _fit_line(tokens: Sequence[int], seconds: Sequence[Sequence[float]], blocks: int) -> tuple[float, float]:
    """Return (seconds of a block, seconds per token): the line through two sizes, at least 0 at size 0."""
    few, many = (statistics.median(times[1:]) / blocks for times in seconds)  # the first is a warm-up
    each = (many - few) / max(1, tokens[1] - tokens[0])
    overhead = few - each * tokens[0]
    return (overhead, each) if 0 <= overhead <= few else (0.0, many / tokens[1])


def _repeat(work: Callable[[], object], seconds: float) -> list[float]:
    """Repeat for some time, at least three times; returns the seconds of each, the first being a warm-up."""
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < until:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return times


def _free_memory() -> float:
    """Return three quarters of the machine's memory; the rest is for the system, the runtime and the text."""
    try:
        return 0.75 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return float("inf")


def _machine() -> str:
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def _facts(model: Model, ranks: RankPolicy) -> tuple[object, ...]:
    """Return everything that the seconds depend on."""
    return (
        FEW, SEQUENCES, LENGTH,
        model.path, model.spec.dtype, model.spec.attention,
        ranks.lora.targets, ranks.lora.rank, ranks.lora.method,
        platform.node(), _machine(), torch.__version__,
    )  # fmt: skip
