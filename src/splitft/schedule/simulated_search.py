"""Try cut vectors on the simulated clock before choosing one.

    makespan's model: a round takes the longest client's own time, or all of the server's work
    the clock:        and clients wait for one another at the server, which can add a third

Where a clock is at hand, the candidates are few and each is rehearsed: for a ladder of times every client's
deepest cut within that time (the model's own answer is one rung), and every common cut; of long rounds, only
the best by a brief simulation in full. So the choice is not slower on the clock than the best common cut. On
each rung a slower client has no deeper cut; but which rung is quickest is the clock's word, and not monotone
in a client's speed.
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
"""A brief round_simulator takes as many steps, and twice as many, and prolongs."""
MOST_STEPS = 64
"""A full one takes them all, or prolongs from here."""
FINALISTS = 8
"""Rungs, and common cuts, that are rehearsed in full."""


def round_simulator(costs: SharedCosts, clients: Sequence[ClientProfile]) -> RoundSimulator:
    """The clock, for these clients."""

    def seconds(cuts: Mapping[str, int], steps: int) -> float:
        shortened = [replace(one, workload=replace(one.workload, steps=steps)) for one in clients]
        rounds = [client_round(costs, one, cuts[one.name]) for one in shortened if one.name in cuts]
        return simulate_round(rounds, costs.server).round_s

    steps = max(one.workload.steps for one in clients)

    def simulate(cuts: Mapping[str, int], brief: bool = False) -> float:
        most = 2 * FEW_STEPS if brief else MOST_STEPS
        if steps <= most:
            return seconds(cuts, steps)
        half, whole = seconds(cuts, most // 2), seconds(cuts, most)
        return whole + (whole - half) / (most // 2) * (steps - most)

    return simulate


def quickest(
    problem: CutProblem, allowed: Mapping[str, Feasible], simulate: RoundSimulator
) -> dict[str, int]:
    """The candidate that is quickest on the clock; ties go to the deeper one.

    Raises ScheduleError if the server's memory does not suffice even with every client at its deepest cut.
    """
    model = best_cuts(problem, allowed)
    prices = prices_of(problem, allowed)
    least_s = max(min(option.own_s for option in options) for options in prices.values())
    times = sorted({o.own_s for options in prices.values() for o in options if o.own_s >= least_s})
    ladder = [deepest(prices, times[i * (len(times) - 1) // RUNGS]) for i in range(RUNGS + 1)]
    rungs = [{name: option.cut for name, option in rung.items()} for rung in ladder]
    common = set.intersection(*(set(found.cuts) for found in allowed.values()))
    shared = [dict.fromkeys(model, cut) for cut in sorted(common)]

    def brief(cuts: Mapping[str, int]) -> float:
        return simulate(cuts, brief=True)

    finalists = [model]
    for kind in (rungs, shared):
        fitting = {tuple(cuts.values()): cuts for cuts in kind if fits_memory(problem, cuts)}
        finalists += sorted(fitting.values(), key=brief)[:FINALISTS]
    return min(finalists, key=lambda cuts: (simulate(cuts), -sum(cuts.values())))
