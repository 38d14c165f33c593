"""Search for the cuts with the least round time on the simulated clock.

    model of `makespan`:   a round takes the longest client's own time, or all of the server's work
    simulated clock:       clients also wait for one another at the server, which can add a third

The candidates are the model's own answer, every client's deepest cut within each of a ladder of times, and
every common cut. All are simulated briefly, and the best of each kind in full, so on the clock the
result is not slower than the best common cut. Within one rung of the ladder a slower client has no deeper
cut; the choice of the rung is not monotone in a client's speed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from splitft.schedule.clock import client_round, simulate_round
from splitft.schedule.makespan import best_cuts, deepest, fits_memory, prices_of
from splitft.schedule.problem import CutProblem, Feasible, RoundSimulator
from splitft.schedule.workload import ClientProfile, SharedCosts

RUNGS = 40
"""Times on the ladder, evenly among the clients' own times."""
FEW_STEPS = 4
"""A brief simulation takes so many steps and twice as many, and extrapolates."""
MOST_STEPS = 64
"""A full simulation takes all steps up to this number, and extrapolates beyond."""
FINALISTS = 8
"""Rungs, and common cuts, that are simulated in full."""


def round_simulator(costs: SharedCosts, clients: Sequence[ClientProfile]) -> RoundSimulator:
    """Return a simulated clock for these clients."""
    steps = max(one.workload.steps for one in clients)

    def simulate(
        cuts: Mapping[str, int], brief: bool = False, ratios: Mapping[str, Mapping[str, float]] = {}
    ) -> float:
        def seconds(steps: int) -> float:
            shortened = [replace(one, workload=replace(one.workload, steps=steps)) for one in clients]
            rounds = [
                client_round(costs, one, cuts[one.name]).scaled(ratios.get(one.name, {}))
                for one in shortened
                if one.name in cuts
            ]
            return simulate_round(rounds, costs.server).round_s

        most = 2 * FEW_STEPS if brief else MOST_STEPS
        if steps <= most:
            return seconds(steps)
        half, whole = seconds(most // 2), seconds(most)
        return whole + (whole - half) / (most // 2) * (steps - most)

    return simulate


def quickest(
    problem: CutProblem, allowed: Mapping[str, Feasible], simulate: RoundSimulator
) -> dict[str, int]:
    """Return the candidate that is quickest on the clock; ties go to the deeper one.

    Raises ScheduleError if the server's memory does not suffice even with every client at its deepest cut.
    """
    # candidates
    model = best_cuts(problem, allowed)
    prices = prices_of(problem, allowed)
    least_s = max(min(option.own_s for option in options) for options in prices.values())
    times = sorted({o.own_s for options in prices.values() for o in options if o.own_s >= least_s})
    ladder = [deepest(prices, times[i * (len(times) - 1) // RUNGS]) for i in range(RUNGS + 1)]
    rungs = [{name: option.cut for name, option in rung.items()} for rung in ladder]
    common_cuts = set.intersection(*(set(found.cuts) for found in allowed.values()))
    common = [dict.fromkeys(model, cut) for cut in sorted(common_cuts)]
    # the best of each kind by a brief simulation, then the best of all by a full one
    finalists = [model]
    for kind in (rungs, common):
        fitting = {tuple(cuts.values()): cuts for cuts in kind if fits_memory(problem, cuts)}
        finalists += sorted(fitting.values(), key=lambda cuts: simulate(cuts, brief=True))[:FINALISTS]
    return min(finalists, key=lambda cuts: (simulate(cuts), -sum(cuts.values())))
