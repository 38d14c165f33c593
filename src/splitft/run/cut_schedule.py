"""The schedule of one run: chooses each round's cuts and charges the round to the simulated clock.

    losses, conditions of the last round --choose--> cuts --(the round is trained)--> --charge--> RoundTimed

A controller knows the conditions of the round before, as a real one would from its measurements: a change in
round r is met by the cuts of round r + 1. The clock charges the conditions as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from splitft.config import RunConfig
from splitft.errors import ScheduleError
from splitft.privacy.known_leakage import audited_recovery, check_fixed_cuts, shallowest_cut
from splitft.schedule.clock import client_round, simulate_in_turn, simulate_round
from splitft.schedule.codec_cost import WireBytes
from splitft.schedule.controllers import Decision, choose
from splitft.schedule.cost import move_seconds
from splitft.schedule.memory import client_memory, server_peak_bytes
from splitft.schedule.problem import CutProblem, feasible, problem_of
from splitft.schedule.round_timeline import SERVER
from splitft.schedule.simulated_search import round_simulator
from splitft.schedule.workload import ClientProfile, Fleet, SharedCosts
from splitft.tracking.events import Bar, RoundTimed

AUTO_SHARE = 4
"""With `cuts: auto` the first decision starts from a quarter of the model's blocks on every client."""


@dataclass
class CutSchedule:
    """Who chooses the cuts, and the clock."""

    config: RunConfig
    fleet: Fleet
    names: tuple[str, ...]
    """Clients that take part."""
    left_out: tuple[str, ...] = ()
    """Why others do not, one sentence each."""
    misfits: tuple[str, ...] = ()
    """Clients of a `fixed` run whose machine would not hold their cut, one sentence each."""
    client_blocks: int = 0
    """Blocks on all clients together that `resources` distributes: those of the given or first cuts."""
    first: Decision = field(default_factory=lambda: Decision({}, ""))
    """The cuts of round 1, chosen before anyone holds a block."""
    drawn: bool = False
    """Whether a timeline has been recorded; later ones are when cuts move."""
    site_cuts: Mapping[str, int] = field(default_factory=dict)
    """Shallowest cuts that clients' own sites allow, where they say so."""

    @classmethod
    def begin(
        cls, config: RunConfig, fleet: Fleet, site_cuts: Mapping[str, int] | None = None
    ) -> tuple[CutSchedule, dict[str, int]]:
        """The pace and the cuts of round 1.

        Raises ScheduleError, naming what a client lacks, if it fits at no cut and `schedule.misfit` is stop,
        or if cuts reveal more than `schedule.max_recovery`.
        """
        everyone = tuple(client.name for client in fleet.clients)
        blocks = fleet.costs.sizes.blocks
        equal = blocks if config.clients.cuts == "whole" else max(1, blocks // AUTO_SHARE)
        start = config.cuts or (equal,) * len(everyone)
        pace = cls(config, fleet, everyone, site_cuts=site_cuts or {})
        given = dict(zip(everyone, start, strict=True))
        if not config.schedule.adaptive:
            pace._check_fixed(given)
            pace.misfits = tuple(pace._misfits(given))
            pace.first = Decision(given, "")
            return pace, given
        lacks = {
            name: found.lack for name, found in feasible(pace.situation(1, given)).items() if not found.cuts
        }
        if lacks and config.schedule.misfit == "stop":
            raise ScheduleError(
                f"{'; '.join(lacks.values())}. Give it more, or leave it out with schedule.misfit: leave-out"
            )
        pace.names = tuple(name for name in everyone if name not in lacks)
        pace.left_out = tuple(lacks.values())
        if not pace.names:
            raise ScheduleError(f"no client fits at any cut: {'; '.join(lacks.values())}")
        given = {name: given[name] for name in pace.names}
        pace.client_blocks = sum(given.values())
        pace.first = choose(config.schedule.controller, pace.situation(1, given))
        return pace, dict(pace.first.cuts)

    def take_wires(self, costs: Mapping[str, WireBytes]) -> None:
        """From now on these clients' messages cost what their own codecs make of them."""
        clients = tuple(
            replace(one, wire=costs[one.name]) if one.name in costs else one for one in self.fleet.clients
        )
        self.fleet = replace(self.fleet, clients=clients)

    def situation(
        self, number: int, cuts: Mapping[str, int], losses: Mapping[str, float] | None = None
    ) -> CutProblem:
        """What a controller knows before a round."""
        schedule, training = self.config.schedule, self.config.training
        clients = self._clients(max(1, number - 1))
        plain = problem_of(
            self.fleet.costs,
            clients,
            [cuts[client.name] for client in clients],
            rounds_left=training.rounds - number + 1,
            moments_kept=training.optimizer_state == "keep",
        )
        deepest = self.fleet.costs.sizes.blocks - 1 if schedule.max_cut is None else schedule.max_cut
        return replace(
            plain,
            gamma=float(schedule.gamma),
            client_blocks=self.client_blocks or None,
            simulate=round_simulator(self.fleet.costs, clients),
            clients=tuple(
                replace(
                    one,
                    min_cut=max(schedule.min_cut, self.floor, self.site_cuts.get(one.name, 1)),
                    max_cut=deepest,
                    loss=(losses or {}).get(one.name),
                    # nothing has been loaded yet before the first round, so nothing has to move
                    options=tuple(replace(option, move_s=0.0) for option in one.options)
                    if number == 1
                    else one.options,
                )
                for one in plain.clients
            ),
        )

    @cached_property
    def floor(self) -> int:
        """The shallowest cut that `schedule.max_recovery` allows."""
        bound = self.config.schedule.max_recovery
        if bound is None:
            return 1
        deepest = self.fleet.costs.sizes.blocks - 1
        if self.config.schedule.max_cut is not None:
            deepest = self.config.schedule.max_cut
        return shallowest_cut(self._recovery, bound, deepest)

    @cached_property
    def _recovery(self) -> Mapping[int, float]:
        """The share of tokens that can be recovered at each audited cut."""
        config = self.config
        return config.schedule.recovery or audited_recovery(
            config.model.name, str(config.wire.hidden), config.privacy, config.split.labels == "server"
        )

    def _check_fixed(self, given: Mapping[str, int]) -> None:
        """Raise ScheduleError if a cut that the user fixed is shallower than it may be."""
        bound = self.config.schedule.max_recovery
        if bound is not None:
            check_fixed_cuts(given, self.floor, self._recovery, bound)
        for name, least in self.site_cuts.items():
            if given.get(name, least) < least:
                raise ScheduleError(
                    f"clients.cuts: {name} has cut {given[name]}, but its site takes part from cut {least} on"
                )

    def choose(self, number: int, cuts: Mapping[str, int], losses: Mapping[str, float]) -> Decision:
        """The cuts of a round, as the controller has them. Raises ScheduleError if they are impossible."""
        if number == 1:
            return self.first
        if not self.config.schedule.adaptive:
            return Decision(cuts, "")
        return choose(self.config.schedule.controller, self.situation(number, cuts, losses))

    def charge(
        self, number: int, participants: Sequence[str], before: Mapping[str, int], cuts: Mapping[str, int]
    ) -> RoundTimed:
        """One round on the simulated clock: moving first, then the participants' legs."""
        job = self.fleet.costs
        now = {client.name: client for client in self._clients(number)}
        kept = self.config.training.optimizer_state == "keep"
        moves = dict.fromkeys(cuts, 0.0)
        loaded = 0
        if number > 1:
            for name, cut in cuts.items():
                moves[name] = move_seconds(job, now[name], before[name], cut, moments_kept=kept)
                loaded += max(0, cut - before[name]) * job.sizes.block_parameters * job.weight_bytes
        simulate = simulate_in_turn if self.config.training.order == "in-turn" else simulate_round
        timeline = simulate([client_round(job, now[name], cuts[name]) for name in participants], job.server)
        move_s = max(moves.values())
        draw = not self.drawn or any(before[name] != cut for name, cut in cuts.items())
        self.drawn = True
        return RoundTimed(
            round=number,
            seconds=move_s + timeline.round_s,
            move_seconds=move_s,
            weight_bytes=loaded,
            legs={name: timeline.seconds_by_leg(name) for name in participants},
            idle={name: timeline.idle_s(name) for name in (*participants, SERVER)},
            memory_bytes=_memory(job, [now[name] for name in participants], cuts),
            bars=tuple(
                Bar(who=one.who, leg=one.leg, start=one.start_s, end=one.end_s) for one in timeline.intervals
            )
            if draw
            else (),
        )

    def machines(self) -> dict[str, str]:
        """Each machine in words, for the record."""
        described = {one.name: f"{one.device.source}; link: {one.link.source}" for one in self._clients(1)}
        return {**described, SERVER: self.fleet.costs.server.device.source}

    def _clients(self, number: int) -> list[ClientProfile]:
        return [client for client in self.fleet.at(number) if client.name in self.names]

    def _misfits(self, cuts: Mapping[str, int]) -> list[str]:
        """Clients whose machine, as described, would not hold the cut that the user fixed."""
        found = []
        for one in self.situation(1, cuts).clients:
            needed = one.option(one.current).client_bytes
            if needed > one.memory_bytes:
                found.append(
                    f"{one.name} would need {needed / 1e9:.1f} GB at cut {one.current}, its machine has "
                    f"{one.memory_bytes / 1e9:.1f} GB (schedule.devices)"
                )
        return found


def _memory(job: SharedCosts, clients: Sequence[ClientProfile], cuts: Mapping[str, int]) -> dict[str, float]:
    """Foretold peak memory of each of these clients, and of the server with all of them."""
    needed = {one.name: client_memory(job, one, cuts[one.name]).total for one in clients}
    return {**needed, SERVER: server_peak_bytes(job, clients, [cuts[one.name] for one in clients])}
