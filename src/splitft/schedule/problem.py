"""What a controller of cuts knows: for each client every cut with its price, and what happened last.

    client a   cut 1   round 40 s   1.2 GB   server 30 s        now at cut 2, loss 2.31, has 4 GB
               cut 2   round 38 s   1.4 GB   server 28 s
               ...
    server     memory, and the weights it holds by the shallowest cut

The table is made by `options` from predicted costs, or by anyone from measured ones. Which cuts a client may
have at all is one question, asked in one place: `feasible`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from splitft.errors import ScheduleError
from splitft.schedule.cost import move_seconds, round_seconds, total_by_place
from splitft.schedule.memory import client_memory, server_memory, server_weights_bytes
from splitft.schedule.workload import ClientProfile, SharedCosts


@dataclass(frozen=True)
class CutOption:
    """What one cut means for one client."""

    cut: int
    """k."""
    seconds: Mapping[str, float]
    """Seconds of a round by leg, with the server to itself."""
    client_bytes: float
    """Peak memory of the client."""
    server_bytes: float
    """What the client adds to the server's peak memory."""
    move_s: float = 0.0
    """Seconds that moving here from the current cut takes, once."""

    @property
    def own_s(self) -> float:
        """Seconds of a round, from the first leg to the last, if the client never waits for others."""
        return sum(self.seconds.values())

    @property
    def compute_s(self) -> float:
        """Seconds of a round in which the client's own processor works."""
        return total_by_place(self.seconds, "client")

    @property
    def server_s(self) -> float:
        """Seconds of a round in which the server works for this client."""
        return total_by_place(self.seconds, "server")


@dataclass(frozen=True)
class ClientChoices:
    """One client before the next round."""

    name: str
    """Who."""
    current: int
    """Its cut in the last round."""
    options: tuple[CutOption, ...]
    """Every cut that the model admits, ascending, as predicted."""
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
    """How much its loss counts in the mean of all clients, such as its tokens."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """Seconds of the last round by leg, at the current cut, as far as they were measured."""

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
        """The price of one cut."""
        for option in self.options:
            if option.cut == cut:
                return option
        raise ScheduleError(
            f"client {self.name!r} has no price for cut {cut}, only for "
            f"{', '.join(str(option.cut) for option in self.options)}"
        )


class RoundSimulator(Protocol):
    """A clock that tells how long a round would take (`round_simulator`)."""

    def __call__(self, cuts: Mapping[str, int], brief: bool = False) -> float:
        """Seconds of a round with these cuts; quicker to tell, and less exact, if brief."""


@dataclass(frozen=True)
class CutProblem:
    """All clients and the server before the next round: everything a controller decides from."""

    clients: tuple[ClientChoices, ...]
    """Who takes part."""
    rounds_left: int = 1
    """Rounds still to come, over which a move must pay."""
    server_memory_bytes: float = math.inf
    """Memory that training may use at the server."""
    server_weights_bytes: tuple[float, ...] = ()
    """Frozen weights at the server by the shallowest cut of all, from 0; empty if they do not count."""
    gamma: float = 1.0
    """Blocks that `paper` moves the client farthest from the mean."""
    client_blocks: int | None = None
    """Blocks on all clients together that `resources` distributes; None for the sum of the current cuts."""
    simulate: RoundSimulator | None = field(default=None, compare=False, repr=False)
    """Seconds of a round with given cuts on a clock, where one is at hand."""

    def __post_init__(self) -> None:
        names = [client.name for client in self.clients]
        if not names or len(set(names)) < len(names):
            raise ScheduleError(f"clients {names}: give at least one, each under a name of its own")
        if not 0 <= self.gamma < math.inf:
            raise ScheduleError(f"gamma is {self.gamma}; it must be a number of at least 0")

    def server_bytes(self, cuts: Mapping[str, int]) -> float:
        """The server's peak memory with these cuts."""
        shallowest = min(cuts.values())
        shared = self.server_weights_bytes[shallowest] if self.server_weights_bytes else 0.0
        return shared + sum(client.option(cuts[client.name]).server_bytes for client in self.clients)


@dataclass(frozen=True)
class Feasible:
    """Which cuts a client may have."""

    cuts: tuple[int, ...]
    """Ascending; empty if there are none."""
    lack: str = ""
    """What is missing if there are none, in words."""


def feasible(problem: CutProblem) -> dict[str, Feasible]:
    """For each client the cuts that fit its bounds, memory and time, or what it lacks.

    Whether a client without any is left out or stops the run is for the caller to say.
    """
    return {client.name: _feasible(client) for client in problem.clients}


def options(
    costs: SharedCosts,
    client: ClientProfile,
    current: int,
    weights_kept: bool = False,
    moments_kept: bool = False,
) -> tuple[CutOption, ...]:
    """The predicted price of every cut 1..L for one client, now at cut `current`."""
    return tuple(
        CutOption(
            cut=cut,
            seconds=round_seconds(costs, client, cut),
            client_bytes=client_memory(costs, client, cut).total,
            server_bytes=server_memory(costs, client, cut).total,
            move_s=move_seconds(costs, client, current, cut, weights_kept, moments_kept),
        )
        for cut in range(1, costs.sizes.blocks + 1)
    )


def problem_of(
    costs: SharedCosts,
    clients: Sequence[ClientProfile],
    cuts: Sequence[int],
    rounds_left: int = 1,
    weights_kept: bool = False,
    moments_kept: bool = False,
    whole_allowed: bool = False,
) -> CutProblem:
    """A problem of predicted prices and device memories; bounds, losses and measurements by `replace`.

    Cuts end at L - 1 unless `whole_allowed`: the whole model on a client sends no hidden states, so on slow
    links it would win every comparison of times, and there would be no split left.
    """
    if len(clients) != len(cuts):
        raise ScheduleError(f"{len(clients)} clients but {len(cuts)} cuts; give one cut a client")
    L = costs.sizes.blocks
    return CutProblem(
        clients=tuple(
            ClientChoices(
                client.name,
                current,
                options(costs, client, current, weights_kept, moments_kept),
                max_cut=L if whole_allowed else L - 1,
                memory_bytes=client.device.memory_bytes,
                weight=client.workload.tokens * client.workload.steps,
            )
            for client, current in zip(clients, cuts, strict=True)
        ),
        rounds_left=rounds_left,
        server_memory_bytes=costs.server.device.memory_bytes,
        server_weights_bytes=tuple(server_weights_bytes(costs, max(1, cut)) for cut in range(L + 1)),
    )


def corrected(client: ClientChoices) -> tuple[CutOption, ...]:
    """The client's options with each measured leg put right at every cut.

    A leg that took twice what was predicted at the current cut is taken to take twice everywhere: the
    machine or the link is that much slower than its profile. Legs that were not measured stay as predicted.
    """
    if client.current not in [option.cut for option in client.options]:
        return client.options
    predicted = client.option(client.current).seconds
    ratio = {
        leg: seconds / predicted[leg]
        for leg, seconds in client.measured.items()
        if predicted.get(leg, 0.0) > 0
    }
    return tuple(
        replace(option, seconds={leg: value * ratio.get(leg, 1.0) for leg, value in option.seconds.items()})
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
