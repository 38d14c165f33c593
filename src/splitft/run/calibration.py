"""Measure a device of this machine: seconds per token of a real block of the model, forward and backward.

    blocks [0, 4) with LoRA, (B, T) batches of two sizes --timed--> Device --cached per model and device

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
from splitft.model import CPU, Model, loss_and_gradient
from splitft.model.devices import device_memory, synchronize
from splitft.model.precision import device_facts
from splitft.schedule.profile import ALLOCATOR_SLACK, Device
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
MOST_SLACK = 2.0
"""Largest slack of an allocator that is believed: of the little memory of a calibration, holes are much."""
SLOT = "calibration"


def measured(model: Model, ranks: RankPolicy, training: TrainingSpec, device: torch.device = CPU) -> Device:
    """Return the speed of a device of this machine for this model: from the cache, or measured now."""
    cache = KeyedCache(
        cache_folder() / "calibrations",
        dump=lambda found: json.dumps(asdict(found)).encode(),
        load=lambda data: Device(**json.loads(data)),
    )
    return cache.cached(_facts(model, ranks, device), lambda: calibrate(model, ranks, training, device))


def calibrate(model: Model, ranks: RankPolicy, training: TrainingSpec, device: torch.device = CPU) -> Device:
    """Time blocks and head on a device now."""
    # blocks with adapters
    span = Span(0, min(BLOCKS, model.shape.blocks))
    length = min(LENGTH, model.shape.max_positions)
    segment = model.segment(span, embedding=True, head=True, device=device)
    bank = attach(segment.blocks, ranks.lora.targets, ranks.scale, model.dtype, device_of=segment.device_of)
    layers = {key: size for key, size in bank.sizes.items() if key[0] in span}
    dtype = torch.promote_types(model.dtype, torch.float32)
    bank.put(SLOT, ranks.start(layers, dtype))
    optimizer = LocalOptimizer(bank.parameters(SLOT), training)
    generator = torch.Generator().manual_seed(ranks.seed)
    shapes = ((1, min(FEW, length)), (SEQUENCES, length))
    batches = [torch.randint(model.shape.vocab, shape, generator=generator).to(device) for shape in shapes]
    # a training step on each batch, repeated
    forward_s: list[list[float]] = [[], []]
    backward_s: list[list[float]] = [[], []]

    def step() -> None:
        for index, tokens in enumerate(batches):
            began = time.perf_counter()
            with torch.enable_grad(), bank.routed([(SLOT, len(tokens))]):
                hidden = segment.run(tokens, span)
            forward_end = _now(device)
            torch.autograd.backward([hidden], [torch.ones_like(hidden) * 1e-3])
            optimizer.step()
            forward_s[index].append(forward_end - began)
            backward_s[index].append(_now(device) - forward_end)

    _repeat(step, SECONDS)
    sizes_timed = [tokens.numel() for tokens in batches]
    forward, backward = (_fit_line(sizes_timed, times, len(span)) for times in (forward_s, backward_s))
    # head and loss
    rows = torch.randn(SEQUENCES * length, model.shape.width, generator=generator).to(model.hidden_dtype)
    rows, targets = rows.to(device), torch.randint(model.shape.vocab, (len(rows),), generator=generator)
    head_s = _repeat(lambda: loss_and_gradient(segment, rows, targets), SECONDS / 2)
    return Device(
        name="measured",
        block_forward_s_per_token=forward[1],
        block_backward_s_per_token=backward[1],
        block_overhead_s=(forward[0] + backward[0]) / 2,
        head_s_per_token=statistics.median(head_s[1:]) / len(rows),
        memory_bytes=_free_memory(device),
        **_memory_constants(device),
        source=f"measured on this machine ({_machine(device)})",
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


def _now(device: torch.device) -> float:
    """Return the seconds of a clock, once the device has done all that it was given."""
    synchronize([device])
    return time.perf_counter()


def _free_memory(device: torch.device) -> float:
    """Return nine tenths of a device's own memory, or three quarters of the machine's.

    The rest is for the runtime, and on the machine for the system and the text. A device without memory of
    its own, or that does not say how much it has, shares the machine's.
    """
    if (own := device_memory(device)) is not None:
        return 0.9 * own
    try:
        return 0.75 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return float("inf")


def _memory_constants(device: torch.device) -> dict[str, float]:
    """Return the constants of the memory model as an accelerator has them after training on it.

    Its allocator counts what tensors take and what it holds for them; what is used beside that are the
    runtime, its kernels and other programs. A CPU has no such counters, and the constants of `Device`.
    """
    counters = ("max_memory_allocated", "max_memory_reserved", "memory_reserved", "mem_get_info")
    module = None if device.type == "cpu" else torch.get_device_module(device)
    if module is None or not all(hasattr(module, name) for name in counters):
        return {}
    allocated, held = module.max_memory_allocated(device), module.max_memory_reserved(device)
    free, total = module.mem_get_info(device)
    return {
        "allocator_slack": min(max(held / allocated, 1.0), MOST_SLACK) if allocated else ALLOCATOR_SLACK,
        "runtime_bytes": float(max(0, total - free - module.memory_reserved(device))),
    }


def _machine(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    return ", ".join([str(device), *map(str, device_facts(device)[2:])])


def _bits(model: Model) -> tuple[object, ...]:
    """Return how weights are held, if not all in the model's type."""
    whole = not model.quantized and model.spec.embedding == "full"
    return () if whole else (model.quantized, model.spec.embedding)


def _facts(model: Model, ranks: RankPolicy, device: torch.device) -> tuple[object, ...]:
    """Return everything that the seconds depend on."""
    return (
        FEW, SEQUENCES, LENGTH,
        model.path, model.spec.dtype, model.spec.attention,
        *_bits(model),
        ranks.lora.targets, ranks.lora.rank, ranks.lora.method,
        device_facts(device), _machine(device), torch.__version__,
    )  # fmt: skip
