"""Profiles of machines and links: their speed for one model, in seconds a token and bytes a second.

    Device          seconds of a block and of the head for each token, and memory
    Link            bytes a second each way, and the delay of an empty message
    ServerProfile   one Device that processes one group of waiting clients at a time

A Device is measured (`run.calibration`), given by the user, or derived from a preset (`presets`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from splitft.errors import ScheduleError
from splitft.specs import ServerAdapters

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
    """Raise ScheduleError, with what was found and what fits, unless `value` is a number in bounds."""
    in_bounds = (above is None or value > above) and (least is None or value >= least)
    if math.isnan(value) or not in_bounds or (math.isinf(value) and not infinite_fits):
        fits = f"above {above:g}" if above is not None else f"of at least {least:g}"
        raise ScheduleError(f"{what} is {value:g}; it must be a number {fits}")


ALLOCATOR_SLACK = 1.3
"""Memory of activations over their bytes, as measured with glibc's allocator on a CPU."""
RUNTIME_BYTES = 64 * 2.0**20
"""Memory of a process when it begins to compute, as measured with torch on a CPU."""


@dataclass(frozen=True)
class Device:
    """The speed of a machine for one model, in seconds a token; LoRA and the optimizer step included."""

    name: str
    """Name of its owner or of its preset."""
    block_forward_s_per_token: float
    """Seconds of one block's forward pass, per padded token."""
    block_backward_s_per_token: float
    """Seconds of one block's backward pass, per padded token."""
    head_s_per_token: float
    """Seconds of head and loss, forward and backward, per labelled token."""
    memory_bytes: float
    """Memory that training may use; infinite if unknown."""
    source: str = "given"
    """Source of the numbers, in words."""
    block_overhead_s: float = 0.0
    """Fixed seconds of a block's forward pass, and of its backward pass, for any number of tokens."""
    allocator_slack: float = ALLOCATOR_SLACK
    """Memory of activations over their bytes, since an allocator leaves holes."""
    runtime_bytes: float = RUNTIME_BYTES
    """Memory of threads and of the workspace of kernels, before anything is trained."""

    def block_forward_s(self, padded_tokens: float) -> float:
        """Return the seconds of one block's forward pass over a batch."""
        return self.block_overhead_s + padded_tokens * self.block_forward_s_per_token

    def block_backward_s(self, padded_tokens: float) -> float:
        """Return the seconds of one block's backward pass over a batch."""
        return self.block_overhead_s + padded_tokens * self.block_backward_s_per_token

    def __post_init__(self) -> None:
        for field in ("block_forward_s_per_token", "block_backward_s_per_token", "head_s_per_token"):
            _check(f"device {self.name!r}: {field}", getattr(self, field), above=0)
        _check(f"device {self.name!r}: block_overhead_s", self.block_overhead_s, least=0)
        _check(f"device {self.name!r}: memory_bytes", self.memory_bytes, above=0, infinite_fits=True)
        _check(f"device {self.name!r}: allocator_slack", self.allocator_slack, least=1)
        _check(f"device {self.name!r}: runtime_bytes", self.runtime_bytes, least=0)

    def scaled(self, speed: float) -> Device:
        """Return a machine that is `speed` times as fast."""
        _check(f"speed relative to device {self.name!r}", speed, above=0)
        return replace(
            self,
            block_forward_s_per_token=self.block_forward_s_per_token / speed,
            block_backward_s_per_token=self.block_backward_s_per_token / speed,
            head_s_per_token=self.head_s_per_token / speed,
            block_overhead_s=self.block_overhead_s / speed,
            source=f"{speed:.3g} times as fast as: {self.source}",
        )


@dataclass(frozen=True)
class Link:
    """A client's link to the server, measured or simulated."""

    name: str
    """Name of its owner or of its preset."""
    up_bytes_per_s: float
    """Sustained rate from the client to the server."""
    down_bytes_per_s: float
    """Sustained rate from the server to the client."""
    latency_s: float
    """One-way delay of an empty message."""
    source: str = "given"
    """Source of the numbers, in words."""

    def __post_init__(self) -> None:
        _check(f"link {self.name!r}: up_bytes_per_s", self.up_bytes_per_s, above=0, infinite_fits=True)
        _check(f"link {self.name!r}: down_bytes_per_s", self.down_bytes_per_s, above=0, infinite_fits=True)
        _check(f"link {self.name!r}: latency_s", self.latency_s, least=0)

    def seconds_up(self, nbytes: float) -> float:
        """Return the seconds until a message of the client has arrived at the server."""
        return self.latency_s + nbytes / self.up_bytes_per_s

    def seconds_down(self, nbytes: float) -> float:
        """Return the seconds until a message of the server has arrived at the client."""
        return self.latency_s + nbytes / self.down_bytes_per_s


@dataclass(frozen=True)
class ServerProfile:
    """The machine that runs the deeper blocks of all clients, one group of clients at a time."""

    device: Device
    """Seconds a token, and memory for all clients together."""
    group_overhead_s: float = 0.0
    """Fixed seconds of a group, for any size."""
    group_tokens: float = 0.0
    """Clients are grouped while they have at most this many padded tokens together; 0: one at a time."""
    adapters: ServerAdapters = "per-client"
    """The owners of the factors that it trains, which decide the order of batches (`server_queue`)."""

    def __post_init__(self) -> None:
        _check("server: group_overhead_s", self.group_overhead_s, least=0)
        _check("server: group_tokens", self.group_tokens, least=0, infinite_fits=True)
