"""The problem that a controller solves: every client's cuts with their prices, and its last round.

    client a   cut 1   round 40 s   1.2 GB   server 30 s        now at cut 2, loss 2.31, has 4 GB
               cut 2   round 38 s   1.4 GB   server 28 s
               ...
    server     memory, and the weights it holds by the shallowest cut

Prices are predicted (`options`). Where legs of the last round were measured, `corrected` scales them by
measured over predicted seconds. `feasible` says which cuts fit a client's bounds, memory and time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from splitft.errors import ScheduleError
from splitft.schedule.cost import move_seconds, round_seconds, total_by_place
from splitft.schedule.memory import client_memory, server_memory, server_shared_bytes
from splitft.schedule.workload import ClientProfile, SharedCosts


@dataclass(frozen=True)
class CutOption:
    """The price of one cut for one client."""

    cut: int
    """k."""
    seconds: Mapping[str, float]
    """Seconds of a round by leg, with the server to itself."""
    client_bytes: float
    """Peak memory of the client."""
    server_bytes: float
    """Bytes that the client adds to the server's peak memory."""
    move_s: float = 0.0
    """Seconds of the move from the current cut, once."""

    @property
    def own_s(self) -> float:
        """Seconds of a round, from the first leg to the last, without waiting for others."""
        return sum(self.seconds.values())

    @property
    def compute_s(self) -> float:
        """Seconds of a round in which the client's processor works."""
        return total_by_place(self.seconds, "client")

    @property
    def server_s(self) -> float:
        """Seconds of a round in which the server works for this client."""
        return total_by_place(self.seconds, "server")


@dataclass(frozen=True)
class ClientChoices:
    """One client before the next round."""

    name: str
    """The client's name."""
    current: int
    """Its cut in the last round."""
    options: tuple[CutOption, ...]
    """Every cut of the model with its predicted price, ascending."""
    min_cut: int = 1
    """The site's smallest allowed cut."""
    max_cut: int | None = None
    """The site's largest allowed cut; None for the model's."""
    memory_bytes: float = math.inf
    """Memory that training may use at the client."""
    compute_s: float = math.inf
    """Seconds of a round that the client's processor may work."""
    loss: float | None = None
    """Held-out loss after the last round, in nats; None before the first."""
    weight: float = 1.0
    """Weight of its loss in the mean of all clients, such as its tokens."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """Measured seconds of the last round by leg (`cost.LEGS`), at `current` and without waiting.

    Only the measured legs have an entry. Empty before the first round, and where nothing is measured.
    """

    def __post_init__(self) -> None:
        cuts = [option.cut for option in self.options]
        if not cuts or cuts != sorted(set(cuts)):
            raise ScheduleError(f"client {self.name!r}: cuts {cuts} are not one or more in ascending order")
        numbers = [*self.measured.values(), self.weight, *([] if self.loss is None else [self.loss])]
        for number in numbers:
            if not math.isfinite(number):
                raise ScheduleError(
                    f"client {self.name!r}: a loss, weight or measured time is {number}; leave out what is "
                    "not a finite number"
                )
        if self.weight <= 0 or any(seconds < 0 for seconds in self.measured.values()):
            raise ScheduleError(f"client {self.name!r}: weights are above 0, and measured times at least 0")

    def option(self, cut: int) -> CutOption:
        """Return the price of one cut. Raises ScheduleError if there is none."""
        for option in self.options:
            if option.cut == cut:
                return option
        raise ScheduleError(
            f"client {self.name!r} has no price for cut {cut}, only for "
            f"{', '.join(str(option.cut) for option in self.options)}"
        )


class RoundSimulator(Protocol):
    """A simulated clock for rounds that differ in their cuts (`round_simulator`)."""

    def __call__(self, cuts: Mapping[str, int], brief: bool = False) -> float:
        """Return the seconds of a round with these cuts; `brief` is faster and less exact."""

    def at_least(self, cuts: Mapping[str, int]) -> float:
        """Return seconds that no round with these cuts is shorter than, without simulating it."""

    def with_ratios(self, ratios: Mapping[str, Mapping[str, float]]) -> RoundSimulator:
        """Return the same clock with the `measured_ratios` of clients, by name."""


@dataclass(frozen=True)
class CutProblem:
    """All clients and the server before the next round: the input of a controller."""

    clients: tuple[ClientChoices, ...]
    """The clients that take part."""
    rounds_left: int = 1
    """Remaining rounds, over which a move must pay."""
    server_memory_bytes: float = math.inf
    """Memory that training may use at the server."""
    server_weights_bytes: tuple[float, ...] = ()
    """Frozen weights and working memory at the server by the shallowest cut of all, from 0; empty to ignore
    them."""
    gamma: float = 1.0
    """Step size of `paper`: blocks that the client farthest from the mean moves."""
    client_blocks: int | None = None
    """Blocks on all clients together that `resources` distributes; None for the sum of the current cuts."""
    simulate: RoundSimulator | None = field(default=None, compare=False, repr=False)
    """Simulated clock of these clients; None to predict by the model of `makespan`."""

    def __post_init__(self) -> None:
        names = [client.name for client in self.clients]
        if not names or len(set(names)) < len(names):
            raise ScheduleError(f"clients {names}: give at least one, each under a name of its own")
        if not 0 <= self.gamma < math.inf:
            raise ScheduleError(f"gamma is {self.gamma}; it must be a number of at least 0")

    def server_bytes(self, cuts: Mapping[str, int]) -> float:
        """Return the server's peak memory with these cuts."""
        shallowest = min(cuts.values())
        shared = self.server_weights_bytes[shallowest] if self.server_weights_bytes else 0.0
        return shared + sum(client.option(cuts[client.name]).server_bytes for client in self.clients)


@dataclass(frozen=True)
class Feasible:
    """The possible cuts of a client."""

    cuts: tuple[int, ...]
    """Ascending; empty if there are none."""
    lack: str = ""
    """If there are none: the missing memory or time, in words."""


def feasible(problem: CutProblem) -> dict[str, Feasible]:
    """Return for each client the cuts that fit its bounds, memory and time, or what it lacks.

    The caller decides whether a client without a possible cut is left out or stops the run.
    """
    return {client.name: _feasible(client) for client in problem.clients}


def options(
    costs: SharedCosts, client: ClientProfile, current: int, moments_kept: bool = False
) -> tuple[CutOption, ...]:
    """Predict the price of every cut 1..L for one client, now at cut `current`."""
    return tuple(
        CutOption(
            cut=cut,
            seconds=round_seconds(costs, client, cut),
            client_bytes=client_memory(costs, client, cut).total,
            server_bytes=server_memory(costs, client, cut).total,
            move_s=move_seconds(costs, client, current, cut, moments_kept),
        )
        for cut in range(1, costs.sizes.blocks + 1)
    )


def problem_of(
    costs: SharedCosts,
    clients: Sequence[ClientProfile],
    cuts: Sequence[int],
    rounds_left: int = 1,
    moments_kept: bool = False,
) -> CutProblem:
    """Return a problem with predicted prices and device memories.

    Bounds, losses and measured seconds are set by `dataclasses.replace`. Cuts end at L - 1, so that every
    client is split; a controller that may choose the whole model (`Controller.whole`) gets `max_cut` L.
    """
    if len(clients) != len(cuts):
        raise ScheduleError(f"{len(clients)} clients but {len(cuts)} cuts; give one cut a client")
    L = costs.sizes.blocks
    return CutProblem(
        clients=tuple(
            ClientChoices(
                client.name,
                current,
                options(costs, client, current, moments_kept),
                max_cut=L - 1,
                memory_bytes=client.device.memory_bytes,
                weight=client.workload.tokens * client.workload.steps,
            )
            for client, current in zip(clients, cuts, strict=True)
        ),
        rounds_left=rounds_left,
        server_memory_bytes=costs.server.device.memory_bytes,
        server_weights_bytes=tuple(server_shared_bytes(costs, clients, max(1, cut)) for cut in range(L + 1)),
    )


def measured_ratios(client: ClientChoices) -> dict[str, float]:
    """Return measured over predicted seconds of each measured leg, at the client's current cut.

    2.0 means that the machine or the link took twice the predicted time.
    """
    predicted = next((one.seconds for one in client.options if one.cut == client.current), {})
    return {
        leg: seconds / predicted[leg]
        for leg, seconds in client.measured.items()
        if predicted.get(leg, 0.0) > 0
    }


def corrected(client: ClientChoices) -> tuple[CutOption, ...]:
    """Return the client's options with its `measured_ratios` applied to each leg at every cut.

    A machine or link that is slower than its profile at the current cut is assumed to be as many times slower
    at every other. Legs that were not measured stay as predicted. All controllers read the corrected prices.
    """
    ratios = measured_ratios(client)
    return tuple(
        replace(option, seconds={leg: value * ratios.get(leg, 1.0) for leg, value in option.seconds.items()})
        for option in client.options
    )


def _feasible(client: ClientChoices) -> Feasible:
    known = [option.cut for option in client.options]
    largest = known[-1] if client.max_cut is None else client.max_cut
    within = [option for option in corrected(client) if client.min_cut <= option.cut <= largest]
    if not within:
        return Feasible(
            (),
            f"client {client.name!r} allows cuts {client.min_cut} to {largest}, but the model has "
            f"{known[0]} to {known[-1]}",
        )
    fits = [option for option in within if option.client_bytes <= client.memory_bytes]
    if not fits:
        least = min(within, key=lambda option: option.client_bytes)
        return Feasible(
            (),
            f"client {client.name!r} lacks {_gb(least.client_bytes - client.memory_bytes)}: cut {least.cut} "
            f"takes {_gb(least.client_bytes)} of memory, and it has {_gb(client.memory_bytes)}",
        )
    quick = [option for option in fits if option.compute_s <= client.compute_s]
    if not quick:
        least = min(fits, key=lambda option: option.compute_s)
        return Feasible(
            (),
            f"client {client.name!r} lacks time: cut {least.cut} computes {least.compute_s:.3g} s a round, "
            f"and it may {client.compute_s:.3g} s",
        )
    return Feasible(tuple(option.cut for option in quick))


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.3g} GB" if nbytes >= 1e7 else f"{nbytes / 1e6:.3g} MB"
