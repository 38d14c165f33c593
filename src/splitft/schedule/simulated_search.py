"""Search for the cuts with the least round time on the simulated clock.

    model of `makespan`:   a round takes the longest client's own time, or all of the server's work
    simulated clock:       clients also wait for one another at the server, which can add a third

The candidates are the model's own answer, every client's deepest cut within each of a ladder of times, and
every common cut. Within one rung of the ladder a slower client has no deeper cut; the choice of the rung is
not monotone in a client's speed.

`shortlisted` simulates all briefly, and the best of each kind in full, so on the clock the result is not
slower than the best common cut by more than a brief simulation errs. `quickest_of` simulates in full whatever
could win by its bound from below (`round_bounds`), so it finds the quickest of all candidates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter

from splitft.schedule.clock import ClientRound, client_round, simulate_round
from splitft.schedule.makespan import best_cuts, deepest, fits_memory, prices_of
from splitft.schedule.problem import CutProblem, Feasible, RoundSimulator
from splitft.schedule.round_bounds import least_round_s
from splitft.schedule.workload import ClientProfile, SharedCosts

RUNGS = 40
"""Times on the ladder, evenly among the clients' own times."""
FEW_STEPS = 4
"""A brief simulation takes so many steps and twice as many, and extrapolates."""
MOST_STEPS = 64
"""A full simulation takes all steps up to this number, and extrapolates beyond."""
FINALISTS = 8
"""Rungs, and common cuts, that are simulated in full."""


@dataclass
class SimulatedRounds:
    """A simulated clock for rounds that differ in their cuts. Implements `problem.RoundSimulator`."""

    costs: SharedCosts
    clients: Sequence[ClientProfile]
    ratios: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Measured over predicted seconds of legs, by client."""
    _rounds: dict[tuple[str, int], ClientRound] = field(default_factory=dict, repr=False)
    """The work of a client at a cut."""

    def __call__(self, cuts: Mapping[str, int], brief: bool = False) -> float:
        """Return the seconds of a round with these cuts; `brief` is faster and less exact."""
        rounds = self._with(cuts)
        steps = max(one.steps for one in rounds)

        def seconds(some: int) -> float:
            shortened = [replace(one, steps=max(1, round(one.steps * some / steps))) for one in rounds]
            return simulate_round(shortened, self.costs.server).round_s

        most = 2 * FEW_STEPS if brief else MOST_STEPS
        if steps <= most:
            return simulate_round(rounds, self.costs.server).round_s
        half, whole = seconds(most // 2), seconds(most)
        return whole + (whole - half) / (most // 2) * (steps - most)

    def at_least(self, cuts: Mapping[str, int]) -> float:
        """Return seconds that no round with these cuts is shorter than, without simulating it."""
        return least_round_s(self._with(cuts), self.costs.server)

    def with_ratios(self, ratios: Mapping[str, Mapping[str, float]]) -> SimulatedRounds:
        """Return a clock on which legs take so many times as long as predicted, by client and leg."""
        return SimulatedRounds(self.costs, self.clients, ratios)

    def _with(self, cuts: Mapping[str, int]) -> list[ClientRound]:
        rounds = []
        for one in self.clients:
            if one.name not in cuts:
                continue
            key = one.name, cuts[one.name]
            if key not in self._rounds:
                found = client_round(self.costs, one, cuts[one.name])
                self._rounds[key] = found.scaled(self.ratios.get(one.name, {}))
            rounds.append(self._rounds[key])
        return rounds


def round_simulator(costs: SharedCosts, clients: Sequence[ClientProfile]) -> SimulatedRounds:
    """Return a simulated clock for these clients."""
    return SimulatedRounds(costs, clients)


@dataclass(frozen=True)
class CutCandidates:
    """Cuts to be tried, by kind; those that the server's memory allows."""

    model: dict[str, int]
    """The exact answer of the model of `makespan`."""
    rungs: tuple[dict[str, int], ...]
    """Every client's deepest cut within each of a ladder of times."""
    common: tuple[dict[str, int], ...]
    """One cut for all."""

    @property
    def all(self) -> tuple[dict[str, int], ...]:
        """All of them."""
        return (self.model, *self.rungs, *self.common)


def candidates(problem: CutProblem, allowed: Mapping[str, Feasible]) -> CutCandidates:
    """Return the cuts to be tried.

    Raises ScheduleError if the server's memory does not suffice even with every client at its deepest cut.
    """
    model = best_cuts(problem, allowed)
    prices = prices_of(problem, allowed)
    least_s = max(min(option.own_s for option in options) for options in prices.values())
    times = sorted({o.own_s for options in prices.values() for o in options if o.own_s >= least_s})
    ladder = [deepest(prices, times[i * (len(times) - 1) // RUNGS]) for i in range(RUNGS + 1)]
    rungs = [{name: option.cut for name, option in rung.items()} for rung in ladder]
    common_cuts = set.intersection(*(set(found.cuts) for found in allowed.values()))
    common = [dict.fromkeys(model, cut) for cut in sorted(common_cuts)]
    return CutCandidates(model, *(_fitting(problem, kind) for kind in (rungs, common)))


def shortlisted(
    problem: CutProblem, allowed: Mapping[str, Feasible], simulate: RoundSimulator
) -> dict[str, int]:
    """Return the candidate that is quickest on the clock, by a short list; ties go to the deeper one.

    Raises ScheduleError if the server's memory does not suffice even with every client at its deepest cut.
    """
    found = candidates(problem, allowed)
    # the best of each kind by a brief simulation, then the best of all by a full one
    finalists = [found.model]
    for kind in (found.rungs, found.common):
        finalists += sorted(kind, key=lambda cuts: simulate(cuts, brief=True))[:FINALISTS]
    return min(finalists, key=lambda cuts: (simulate(cuts), -sum(cuts.values())))


def quickest_of(
    tried: Iterable[Mapping[str, int]], simulate: RoundSimulator, limit_s: float = math.inf
) -> tuple[dict[str, int], float] | None:
    """Return the quickest of these cuts with its seconds; None if none is quicker than `limit_s`.

    Ties go to the deeper one.
    """
    best: tuple[float, int, dict[str, int]] | None = None
    for bound_s, cuts in sorted(((simulate.at_least(one), one) for one in tried), key=itemgetter(0)):
        if bound_s >= limit_s or (best and bound_s > best[0]):
            break
        found = simulate(cuts), -sum(cuts.values()), dict(cuts)
        if found[0] < limit_s and (best is None or found[:2] < best[:2]):
            best = found
    return None if best is None else (best[2], best[0])


def _fitting(problem: CutProblem, kind: Sequence[dict[str, int]]) -> tuple[dict[str, int], ...]:
    return tuple({tuple(cuts.values()): cuts for cuts in kind if fits_memory(problem, cuts)}.values())
