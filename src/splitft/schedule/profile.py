"""How fast a machine and its connection are: measured once, or taken from a preset.

    Calibration   what the machine at hand was measured to do         --scaled-->  Device of a client
    DevicePreset  a class of machines by its published FLOP/s         --relative-->  Device of a client
    Link          bytes a second each way, and the delay of an empty message
    Server        one Device that works on one group of waiting clients at a time

A preset is only a ratio: with a calibration at hand the measured seconds are divided by it, and without one
they come from the model's FLOPs. Published peaks are not what training reaches: `SUSTAINED_SHARE` of them
is assumed, the same for all, so that ratios between presets do not depend on it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal, TypeVar

from splitft.errors import ScheduleError
from splitft.schedule.sizes import ModelSizes

T = TypeVar("T")

SUSTAINED_SHARE = 0.3
"""Share of the peak that fine-tuning is assumed to reach (PaLM reports 0.46 for pre-training on its
own hardware, arXiv 2204.02311, table 3; small batches reach less)."""

GB = 1e9
MBIT_PER_S = 1e6 / 8
"""One Mbit/s in bytes a second."""


def _check(
    what: str,
    value: float,
    above: float | None = None,
    least: float | None = None,
    infinite_fits: bool = False,
) -> None:
    """Raise ScheduleError, saying what was found and what fits, unless value is a number in bounds."""
    in_bounds = (above is None or value > above) and (least is None or value >= least)
    if math.isnan(value) or not in_bounds or (math.isinf(value) and not infinite_fits):
        fits = f"above {above:g}" if above is not None else f"of at least {least:g}"
        raise ScheduleError(f"{what} is {value:g}; it must be a number {fits}")


@dataclass(frozen=True)
class Device:
    """What a machine does with one model, in seconds a token; LoRA and the optimizer's step included."""

    name: str
    """Of whom or of what."""
    block_forward_s_per_token: float
    """Seconds of one block's forward pass, per padded token."""
    block_backward_s_per_token: float
    """Seconds of one block's backward pass, per padded token."""
    head_s_per_token: float
    """Seconds of head and loss, forward and backward, per labelled token."""
    memory_bytes: float
    """Memory that training may use; infinite if nobody said."""
    source: str = "given"
    """Where the numbers come from, in words."""
    block_overhead_s: float = 0.0
    """Seconds that a block's forward pass takes however few the tokens, and its backward pass again."""

    def block_forward_s(self, padded_tokens: float) -> float:
        """Seconds of one block's forward pass over a batch."""
        return self.block_overhead_s + padded_tokens * self.block_forward_s_per_token

    def block_backward_s(self, padded_tokens: float) -> float:
        """Seconds of one block's backward pass over a batch."""
        return self.block_overhead_s + padded_tokens * self.block_backward_s_per_token

    def __post_init__(self) -> None:
        for field in ("block_forward_s_per_token", "block_backward_s_per_token", "head_s_per_token"):
            _check(f"device {self.name!r}: {field}", getattr(self, field), above=0)
        _check(f"device {self.name!r}: block_overhead_s", self.block_overhead_s, least=0)
        _check(f"device {self.name!r}: memory_bytes", self.memory_bytes, above=0, infinite_fits=True)

    def scaled(self, speed: float, name: str | None = None, memory_bytes: float | None = None) -> Device:
        """The same work on a machine `speed` times as fast."""
        _check(f"speed relative to device {self.name!r}", speed, above=0)
        return replace(
            self,
            name=self.name if name is None else name,
            block_forward_s_per_token=self.block_forward_s_per_token / speed,
            block_backward_s_per_token=self.block_backward_s_per_token / speed,
            head_s_per_token=self.head_s_per_token / speed,
            block_overhead_s=self.block_overhead_s / speed,
            memory_bytes=self.memory_bytes if memory_bytes is None else memory_bytes,
            source=f"{speed:.3g} times as fast as: {self.source}",
        )


@dataclass(frozen=True)
class Link:
    """A client's connection to the server, as measured or as simulated."""

    name: str
    """Of whom or of what."""
    up_bytes_per_s: float
    """Sustained rate from the client to the server."""
    down_bytes_per_s: float
    """Sustained rate from the server to the client."""
    latency_s: float
    """One-way delay of an empty message."""
    source: str = "given"
    """Where the numbers come from, in words."""

    def __post_init__(self) -> None:
        _check(f"link {self.name!r}: up_bytes_per_s", self.up_bytes_per_s, above=0, infinite_fits=True)
        _check(f"link {self.name!r}: down_bytes_per_s", self.down_bytes_per_s, above=0, infinite_fits=True)
        _check(f"link {self.name!r}: latency_s", self.latency_s, least=0)

    def seconds_up(self, nbytes: float) -> float:
        """Seconds until a message of the client has arrived at the server."""
        return self.latency_s + nbytes / self.up_bytes_per_s

    def seconds_down(self, nbytes: float) -> float:
        """Seconds until a message of the server has arrived at the client."""
        return self.latency_s + nbytes / self.down_bytes_per_s


@dataclass(frozen=True)
class ServerProfile:
    """The machine that runs the deeper blocks of all clients, one group of waiting clients at a time."""

    device: Device
    """Seconds a token, and memory for all clients together."""
    group_overhead_s: float = 0.0
    """Seconds that a group takes however small it is."""
    group_tokens: float = 0.0
    """Clients are grouped while they have at most this many padded tokens together; 0: one at a time."""
    adapters: Literal["per-client", "shared", "shared-in-turn"] = "per-client"
    """Whose factors it trains, which decides who has to wait for whom (`turns`)."""

    def __post_init__(self) -> None:
        _check("server: group_overhead_s", self.group_overhead_s, least=0)
        _check("server: group_tokens", self.group_tokens, least=0, infinite_fits=True)


@dataclass(frozen=True)
class Calibration:
    """What timing real blocks on one machine found; a plain result, filled elsewhere."""

    device: Device
    """Measured seconds a token."""
    model: str
    """Model whose blocks were timed."""
    dtype: str
    """Type of its weights, such as bfloat16."""
    context_tokens: int
    """Length of the sequences timed."""
    flops_per_s: float
    """FLOP/s that the forward pass of a block reached; presets are relative to it."""

    def __post_init__(self) -> None:
        _check("calibration: flops_per_s", self.flops_per_s, above=0)

    def to_json(self) -> str:
        """One line of JSON that `from_json` reads back exactly."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Calibration:
        """Read a calibration; raises ScheduleError if the text is not one."""
        try:
            fields: dict[str, Any] = json.loads(text)
            return Calibration(**{**fields, "device": Device(**fields["device"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ScheduleError(f"this is not a calibration ({error}); measure again") from error


def calibrated(device: Device, sizes: ModelSizes, model: str, dtype: str, context_tokens: int) -> Calibration:
    """A calibration from measured seconds a token: the FLOP/s follow from the model's sizes."""
    flops_per_s = sizes.block_flops_per_token(context_tokens) / device.block_forward_s_per_token
    return Calibration(device, model, dtype, context_tokens, flops_per_s)


@dataclass(frozen=True)
class DevicePreset:
    """A class of machines, by published numbers: an order of magnitude, not a measurement."""

    peak_flops_per_s: float
    """Dense peak in the fastest 16-bit or 32-bit format that training uses there."""
    memory_bytes: float
    """Memory that training may use."""
    source: str
    """Who published the peak and the memory, and what was left for other programs."""


DEVICES: dict[str, DevicePreset] = {
    "phone": DevicePreset(
        2.8e12,
        4 * GB,
        "Adreno 750 (Snapdragon 8 Gen 3): 1,536 FP32 units at 0.9 GHz, 2.8 TFLOP/s FP32, as third-party GPU "
        "tables list it (Qualcomm publishes none); 4 of 12 GB, the rest is the phone's",
    ),
    "laptop": DevicePreset(
        3.6e12, 8 * GB, "Apple M2, 10-core GPU: 3.6 TFLOP/s FP32, as Apple states; 8 of 16 GB unified memory"
    ),
    "edge-gpu": DevicePreset(
        42e12,
        24 * GB,
        "NVIDIA Jetson AGX Orin technical brief: 170 sparse INT8 TOPS on tensor cores, so 85 dense and "
        "42 TFLOP/s FP16; 24 of 32 GB shared memory",
    ),
    "workstation": DevicePreset(
        71e12,
        22 * GB,
        "NVIDIA GeForce RTX 3090, GA102 whitepaper: 71 TFLOP/s dense BF16 with FP32 sums; 22 of 24 GB",
    ),
    "server-gpu": DevicePreset(
        312e12, 78 * GB, "NVIDIA A100 80 GB data sheet: 312 TFLOP/s dense BF16; 78 of 80 GB"
    ),
}
"""Every class of machine, by the name a user writes."""

LINKS: dict[str, Link] = {
    "lte": Link(
        "lte",
        8 * MBIT_PER_S,
        30 * MBIT_PER_S,
        0.025,
        "4G in everyday use, 30 Mbit/s down, 8 up, 50 ms there and back: of the order of Ookla's and "
        "Opensignal's country medians, which differ by several times",
    ),
    "dsl": Link(
        "dsl", 10 * MBIT_PER_S, 50 * MBIT_PER_S, 0.01, "the usual VDSL2 product, 50 Mbit/s down and 10 up"
    ),
    "fibre": Link(
        "fibre",
        100 * MBIT_PER_S,
        300 * MBIT_PER_S,
        0.005,
        "a usual fibre product, 300 Mbit/s down and 100 up; about 10 ms there and back",
    ),
    "lan": Link("lan", 1000 * MBIT_PER_S, 1000 * MBIT_PER_S, 0.00025, "Gigabit Ethernet, IEEE 802.3ab"),
}
"""Every class of connection, by the name a user writes."""


def device_preset(
    preset: str, sizes: ModelSizes, context_tokens: int = 256, measured: Calibration | None = None
) -> Device:
    """A device of this class, with the measured seconds of `measured` scaled, or else from FLOPs alone.

    Raises ScheduleError with the nearest name if there is no such class.
    """
    known = chosen(preset, DEVICES, "device")
    flops_per_s = SUSTAINED_SHARE * known.peak_flops_per_s
    if measured is not None:
        speed = flops_per_s / measured.flops_per_s
        return measured.device.scaled(speed, preset, known.memory_bytes)
    block_s = sizes.block_flops_per_token(context_tokens) / flops_per_s
    head_s = sizes.head_flops_per_token() / flops_per_s
    source = f"{SUSTAINED_SHARE:g} of the peak of: {known.source}"
    return Device(preset, block_s, block_s, head_s, known.memory_bytes, source)


def link_preset(preset: str) -> Link:
    """A connection of this class; raises ScheduleError with the nearest name if there is none."""
    return chosen(preset, LINKS, "link")


def chosen(name: str, known: Mapping[str, T], what: str) -> T:
    """The entry of this name, or a ScheduleError that says what fits and the nearest name."""
    if name not in known:
        near = get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ScheduleError(f"there is no {what} {name!r}, only {', '.join(known)}{hint}")
    return known[name]
