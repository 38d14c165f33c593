"""Section `schedule`: the controller of the cuts, and the machines and links of the simulated clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from splitft.registry import Lazy, Registry
from splitft.specs.base import NameIn, Spec


@dataclass(frozen=True)
class Controller:
    """A way to choose the cuts of the next round."""

    choose: Callable[..., Any]
    """(`schedule.problem.CutProblem`) -> `schedule.controllers.Decision`; a pure function."""
    adaptive: bool = True
    """True if it chooses cuts; otherwise they stay as given in clients.cuts."""
    whole: bool = False
    """True if it may leave the whole model on a client (cut L) without being told so by `max_cut`."""
    chooses_mode: bool = False
    """True if it chooses how the server's factors step, where `split.server_adapters` is auto."""


CONTROLLERS: Registry[Controller] = Registry("controller", "splitft.controllers", {
    "fixed": Controller(Lazy("splitft.schedule.controllers:fixed"), adaptive=False),
    "resources": Controller(Lazy("splitft.schedule.controllers:resources")),
    "paper": Controller(Lazy("splitft.schedule.performance:paper")),
    "performance": Controller(Lazy("splitft.schedule.performance:performance")),
    "makespan": Controller(Lazy("splitft.schedule.controllers:makespan")),
    "quickest": Controller(Lazy("splitft.schedule.design_space:quickest"), whole=True, chooses_mode=True),
})  # fmt: skip
"""Every controller, by the name in `schedule.controller`."""


class DeviceSpec(Spec):
    """A machine by its numbers, where no preset fits."""

    block_forward_ms_per_token: float = Field(gt=0)
    """Milliseconds of one block's forward pass per token."""
    block_backward_ms_per_token: float = Field(gt=0)
    """Milliseconds of one block's backward pass per token."""
    head_ms_per_token: float = Field(gt=0)
    """Milliseconds of head and loss, forward and backward, per labelled token."""
    memory_gb: float = Field(gt=0)
    """Memory that training may use, in GB (10^9 bytes)."""
    block_overhead_ms: float = Field(0.0, ge=0)
    """Fixed milliseconds of a block's forward pass, and of its backward pass, for any number of tokens."""


class LinkSpec(Spec):
    """A link to the server by its numbers."""

    up_mbit_per_s: float = Field(gt=0)
    """Upload rate, in Mbit/s."""
    down_mbit_per_s: float = Field(gt=0)
    """Download rate, in Mbit/s."""
    latency_ms: float = Field(0.0, ge=0)
    """One-way delay, in milliseconds."""


DeviceName = Literal["phone", "laptop", "workstation", "edge-gpu", "server-gpu", "measured"]
LinkName = Literal["lte", "dsl", "fibre", "lan"]


class ChangeSpec(Spec):
    """A scripted change of conditions: one client becomes faster or slower."""

    round: int = Field(ge=1)
    """First round with the new conditions."""
    client: int = Field(ge=1)
    """Number of the client, from 1."""
    link: float = Field(1.0, gt=0)
    """Factor on its link's rates: 0.1 for a tenth."""
    compute: float = Field(1.0, gt=0)
    """Factor on its machine's speed."""


class ScheduleSpec(Spec):
    """The controller of the cuts, and the machines and links of the simulated clock."""

    controller: Annotated[str, NameIn(CONTROLLERS)] = "fixed"
    """`fixed`: the cuts in clients.cuts; `resources`: cuts that fit memory and equalise compute time;
    `paper`: SplitFT's rule, by resources and held-out loss, which drifts to the bounds; `performance`: the
    same idea with a fixed point; `makespan`: the shortest predicted round in which every client is split;
    `quickest`: the shortest of all, with the whole model on clients for which that is quicker."""
    devices: DeviceName | DeviceSpec | tuple[DeviceName | DeviceSpec, ...] = "laptop"
    """Machines, one for all clients or one for each: a preset, `measured` (this machine), or numbers."""
    links: LinkName | LinkSpec | tuple[LinkName | LinkSpec, ...] = "fibre"
    """Links to the server, one for all clients or one for each: a preset, or numbers."""
    server: DeviceName | DeviceSpec = "server-gpu"
    """The server's machine."""
    launch_overhead: float = Field(0.0, ge=0)
    """Multiple of the estimated time for launching kernels on presets' GPUs: 0 leaves it out, 1 is the
    estimate."""
    min_cut: int = Field(1, ge=1)
    """Shallowest cut that a controller may choose, for privacy."""
    max_recovery: float | None = Field(None, ge=0, le=1)
    """Largest share of tokens that the strongest known attack may recover at a client's cut, by the audit;
    null for no bound. It sets the shallowest cut."""
    recovery: dict[int, Annotated[float, Field(ge=0, le=1)]] | None = None
    """The audit's figures for this run, share of tokens by cut (`{2: 0.95, 8: 0.4}`); null for those stored
    with the package for a known model."""
    max_cut: int | None = Field(None, ge=1)
    """Deepest cut that a controller may choose; null for all blocks but the last, with `quickest` for all."""
    gamma: int = Field(1, ge=1)
    """Step size of the controller `paper`, in blocks; for `performance`, the power of mean / loss."""
    misfit: Literal["stop", "leave-out"] = "stop"
    """If a client's memory is too small for the shallowest cut: `stop` the run, or leave the client out."""
    changes: tuple[ChangeSpec, ...] = ()
    """Scripted changes of conditions while training."""

    @property
    def adaptive(self) -> bool:
        """True if a controller chooses the cuts; otherwise they stay as given in clients.cuts."""
        return CONTROLLERS[self.controller].adaptive

    @property
    def may_choose_whole(self) -> bool:
        """True if the controller may leave the whole model on a client where `max_cut` says nothing."""
        return CONTROLLERS[self.controller].whole
