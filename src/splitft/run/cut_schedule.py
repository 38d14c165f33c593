"""The cuts of a run's rounds: ask the controller, and charge each round to the simulated clock.

    losses, times of the last round --choose--> cuts --(the round is trained)--> --charge--> RoundTimed

A controller knows the times of the round before, so a change in round r changes the cuts of round r + 1. In
simulation these times are those of the simulated clock, which has the scripted changes of conditions; wall
seconds of the simulating machine have no influence. In deployment they are the seconds that sites and server
measured (`observe`), and the clock shows what the profiles predict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from splitft.config import RunConfig
from splitft.errors import ScheduleError
from splitft.privacy.known_leakage import audited_recovery, check_fixed_cuts, shallowest_cut
from splitft.run.fleet import wire_costs
from splitft.run.measured_legs import MeasuredLegs
from splitft.schedule.arrival_order import StepMark, arrival_order
from splitft.schedule.clock import client_round, simulate_in_turn, simulate_round
from splitft.schedule.codec_cost import WireBytes
from splitft.schedule.controllers import Decision, choose
from splitft.schedule.cost import move_seconds
from splitft.schedule.memory import peak_bytes
from splitft.schedule.problem import CutProblem, feasible, problem_of
from splitft.schedule.round_timeline import SERVER
from splitft.schedule.simulated_search import round_simulator
from splitft.schedule.step_counts import steps_by_time
from splitft.schedule.workload import ClientProfile, Fleet
from splitft.tracking.events import Bar, Event, RoundTimed, StepDone, WireChosen

AUTO_SHARE = 4
"""With `cuts: auto` the first decision starts from a quarter of the model's blocks on every client."""


@dataclass
class CutSchedule:
    """The controller of a run's cuts, and its simulated clock. Implements `training.rounds.Schedule`."""

    config: RunConfig
    fleet: Fleet
    names: tuple[str, ...]
    """Clients that take part."""
    left_out: tuple[str, ...] = ()
    """The reasons why others do not, one sentence each."""
    misfits: tuple[str, ...] = ()
    """Clients of a `fixed` run whose machine lacks memory for their cut, one sentence each."""
    client_blocks: int = 0
    """Blocks on all clients together that `resources` distributes: those of the given or first cuts."""
    first: Decision = field(default_factory=lambda: Decision({}, ""))
    """The cuts of round 1, chosen before any client loads a block."""
    site_cuts: Mapping[str, int] = field(default_factory=dict)
    """Shallowest cuts that data owners allow, by client; only of those that have a bound."""
    split_only: bool = False
    """True while every client is to be split, so that its codecs can be measured (`choose_first`)."""
    steps_taken: Mapping[str, int] = field(default_factory=dict)
    """Steps of the round that trains, where they go by time."""
    _timeline_sent: bool = False  # RoundTimed has bars in the first round, and whenever a cut moves
    _measured: MeasuredLegs = field(default_factory=MeasuredLegs)

    @classmethod
    def begin(
        cls,
        config: RunConfig,
        fleet: Fleet,
        site_cuts: Mapping[str, int] | None = None,
        split_only: bool = False,
    ) -> tuple[CutSchedule, dict[str, int]]:
        """Return the schedule of a run and the cuts of round 1; with `split_only` no client has all blocks.

        Raises ScheduleError, naming what a client lacks, if it fits at no cut and `schedule.misfit` is stop,
        or if cuts reveal more than `schedule.max_recovery`.
        """
        everyone = tuple(client.name for client in fleet.clients)
        blocks = fleet.costs.sizes.blocks
        equal = blocks if config.clients.cuts == "whole" else max(1, blocks // AUTO_SHARE)
        start = config.cuts or (equal,) * len(everyone)
        schedule = cls(config, fleet, everyone, site_cuts=site_cuts or {}, split_only=split_only)
        given = dict(zip(everyone, start, strict=True))
        # fixed cuts
        if not config.schedule.adaptive:
            schedule._check_fixed(given)
            schedule.misfits = tuple(schedule._misfits(given))
            schedule.first = Decision(given, "")
            return schedule, given
        # clients that fit at no cut
        possible = feasible(schedule.problem(1, given))
        lacks = {name: found.lack for name, found in possible.items() if not found.cuts}
        if lacks and config.schedule.misfit == "stop":
            raise ScheduleError(
                f"{'; '.join(lacks.values())}. Give it more, or leave it out with schedule.misfit: leave-out"
            )
        schedule.names = tuple(name for name in everyone if name not in lacks)
        schedule.left_out = tuple(lacks.values())
        if not schedule.names:
            raise ScheduleError(f"no client fits at any cut: {'; '.join(lacks.values())}")
        # the controller's first decision
        given = {name: given[name] for name in schedule.names}
        schedule.client_blocks = sum(given.values())
        schedule.first = choose(config.schedule.controller, schedule.problem(1, given))
        return schedule, dict(schedule.first.cuts)

    def set_wires(self, costs: Mapping[str, WireBytes]) -> None:
        """Charge these clients' messages by their own codecs from now on."""
        clients = tuple(
            replace(one, wire=costs[one.name]) if one.name in costs else one for one in self.fleet.clients
        )
        self.fleet = replace(self.fleet, clients=clients)

    def choose_first(self, cuts: Mapping[str, int], why: str = "") -> None:
        """Choose the cuts of round 1 again, if codecs were measured at `cuts`; `why` adds to the reason."""
        measured, self.split_only = self.split_only, False
        if measured and self.config.schedule.may_choose_whole:
            self.first = choose(self.config.schedule.controller, self.problem(1, cuts))
        self.first = replace(self.first, reason="; ".join(filter(None, (self.first.reason, why))))

    def observe(self, event: Event) -> None:
        """Take in the codecs and the measured seconds of a deployed run; other events are ignored."""
        if isinstance(event, WireChosen):
            chosen = {"hidden": event.hidden, "gradient": event.gradient}
            wire, width = self.config.wire.model_copy(update=chosen), self.fleet.costs.sizes.width
            self.set_wires({event.client: wire_costs(wire, width)})
        if isinstance(event, StepDone):
            self._measured.observe(event)

    def problem(
        self, number: int, cuts: Mapping[str, int], losses: Mapping[str, float] | None = None
    ) -> CutProblem:
        """Return what a controller knows before a round."""
        schedule, training = self.config.schedule, self.config.training
        clients = self._clients(max(1, number - 1))
        predicted = problem_of(
            self.fleet.costs,
            clients,
            [cuts[client.name] for client in clients],
            rounds_left=training.rounds - number + 1,
            moments_kept=training.optimizer_state == "keep",
        )
        return replace(
            predicted,
            gamma=float(schedule.gamma),
            client_blocks=self.client_blocks or None,
            simulate=round_simulator(self.fleet.costs, clients),
            clients=tuple(
                replace(
                    one,
                    min_cut=max(schedule.min_cut, self.min_cut, self.site_cuts.get(one.name, 1)),
                    max_cut=self.max_cut,
                    loss=(losses or {}).get(one.name),
                    measured=self._measured.of(one, number - 1, training.steps),
                    # before the first round no client has loaded a block, so none has to move
                    options=tuple(replace(option, move_s=0.0) for option in one.options)
                    if number == 1
                    else one.options,
                )
                for one in predicted.clients
            ),
        )

    @cached_property
    def min_cut(self) -> int:
        """The shallowest cut that `schedule.max_recovery` allows."""
        bound, L = self.config.schedule.max_recovery, self.fleet.costs.sizes.blocks
        if bound is None:
            return 1
        try:
            return shallowest_cut(self._recovery, bound, min(self.max_cut, L - 1))
        except ScheduleError:
            if self.max_cut == L:  # the whole model on the client sends no hidden states
                return L
            raise

    @property
    def max_cut(self) -> int:
        """The deepest cut that the controller may choose."""
        L, schedule = self.fleet.costs.sizes.blocks, self.config.schedule
        if schedule.max_cut is not None:
            return min(schedule.max_cut, L - self.split_only)
        whole = schedule.may_choose_whole and self.config.split.labels == "client" and not self.split_only
        return L if whole else L - 1

    @cached_property
    def _recovery(self) -> Mapping[int, float]:
        """The share of tokens that can be recovered at each audited cut."""
        config = self.config
        return config.schedule.recovery or audited_recovery(
            config.model.name, str(config.wire.hidden), config.privacy, config.split.labels == "server"
        )

    def _check_fixed(self, given: Mapping[str, int]) -> None:
        """Raise ScheduleError if a fixed cut is shallower than allowed."""
        bound = self.config.schedule.max_recovery
        if bound is not None:
            check_fixed_cuts(given, self.min_cut, self._recovery, bound)
        for name, least in self.site_cuts.items():
            if given.get(name, least) < least:
                raise ScheduleError(
                    f"clients.cuts: {name} has cut {given[name]}, but its site takes part from cut {least} on"
                )

    def choose(self, number: int, cuts: Mapping[str, int], losses: Mapping[str, float]) -> Decision:
        """Return the controller's cuts for a round. Raises ScheduleError if they are impossible."""
        if number == 1:
            return self.first
        if not self.config.schedule.adaptive:
            return Decision(cuts, "")
        return choose(self.config.schedule.controller, self.problem(number, cuts, losses))

    def steps(self, number: int, participants: Sequence[str], cuts: Mapping[str, int]) -> dict[str, int]:
        """Return each participant's steps within the time of the slowest, as the last round was."""
        clients = {client.name: client for client in self._clients(max(1, number - 1))}
        rounds = [client_round(self.fleet.costs, clients[name], cuts[name]) for name in participants]
        self.steps_taken = steps_by_time(rounds, self.fleet.costs.server)
        return self.steps_taken

    def charge(
        self, number: int, participants: Sequence[str], before: Mapping[str, int], cuts: Mapping[str, int]
    ) -> RoundTimed:
        """Charge one round to the simulated clock: moving blocks first, then the participants' legs."""
        costs = self.fleet.costs
        clients = {client.name: client for client in self._clients(number)}
        kept = self.config.training.optimizer_state == "keep"
        # clients change their cuts at the same time
        move_s, loaded = 0.0, 0
        for name, cut in cuts.items() if number > 1 else ():
            seconds = move_seconds(costs, clients[name], before[name], cut, moments_kept=kept)
            move_s = max(move_s, seconds)
            loaded += max(0, cut - before[name]) * costs.sizes.block_parameters * costs.weight_bytes
        # then they train
        simulate = simulate_in_turn if self.config.training.order == "in-turn" else simulate_round
        rounds = [
            replace(one, steps=self.steps_taken.get(one.name, one.steps))
            for one in (client_round(costs, clients[name], cuts[name]) for name in participants)
        ]
        timeline = simulate(rounds, costs.server)
        with_bars = not self._timeline_sent or any(before[name] != cut for name, cut in cuts.items())
        self._timeline_sent = True
        return RoundTimed(
            round=number,
            seconds=move_s + timeline.round_s,
            move_seconds=move_s,
            weight_bytes=loaded,
            legs={name: timeline.seconds_by_leg(name) for name in participants},
            idle={name: timeline.idle_s(name) for name in (*participants, SERVER)},
            memory_bytes=peak_bytes(costs, [clients[name] for name in participants], cuts),
            bars=tuple(
                Bar(who=one.who, leg=one.leg, start=one.start_s, end=one.end_s) for one in timeline.intervals
            )
            if with_bars
            else (),
        )

    def arrival_order(self, number: int, cuts: Mapping[str, int], steps: int) -> list[StepMark]:
        """Return the order of these clients' steps at the server, as the clock has it in a round.

        Implements `schedule.arrival_order.ArrivalOrder`.
        """
        clients = {client.name: client for client in self._clients(number)}
        costs = self.fleet.costs
        rounds = [replace(client_round(costs, clients[name], cut), steps=steps) for name, cut in cuts.items()]
        return arrival_order(simulate_round(rounds, costs.server), rounds) if rounds else []

    def machines(self) -> dict[str, str]:
        """Return the description of each machine and link, for the record."""
        described = {one.name: f"{one.device.source}; link: {one.link.source}" for one in self._clients(1)}
        return {**described, SERVER: self.fleet.costs.server.device.source}

    def _clients(self, number: int) -> list[ClientProfile]:
        return [client for client in self.fleet.at(number) if client.name in self.names]

    def _misfits(self, cuts: Mapping[str, int]) -> list[str]:
        """Return a sentence for each client whose machine lacks memory for its fixed cut."""
        found = []
        for one in self.problem(1, cuts).clients:
            needed = one.option(one.current).client_bytes
            if needed > one.memory_bytes:
                found.append(
                    f"{one.name} would need {needed / 1e9:.1f} GB at cut {one.current}, its machine has "
                    f"{one.memory_bytes / 1e9:.1f} GB (schedule.devices)"
                )
        return found
