"""The controller `quickest`: the quickest point of the whole design space, by the simulated clock.

    each client   its cut, from 1 to L; at L it trains the whole model, is not split, and sends adapters alone
    the run       how the server's factors step, and the micro-batches of a step (`RunMode`)
    least         seconds of a round / progress of its steps (`specs.server_stepping`)

Methods of the field are points of this space, so on the clock the choice is not slower than any of them:

    fedlora                      cut L for all               splitfed-v2   one cut, shared-in-turn
    splitfed-v1, splitft-fixed   one cut, per-client         splitlora     one cut, shared
    makespan                     cuts 1 to L - 1, per-client

The cuts tried are the candidates of `simulated_search` with and without L; what can win is simulated in full.
A run's mode is chosen once, before its first round, and its cuts before every round.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from splitft.errors import ScheduleError
from splitft.schedule.controllers import Decision, worth_moving
from splitft.schedule.makespan import best_cuts, predicted_round_s
from splitft.schedule.problem import CutProblem, RoundSimulator, feasible, measured_ratios
from splitft.schedule.simulated_search import candidates, quickest_of
from splitft.schedule.workload import SharedCosts
from splitft.specs.server_stepping import SERVER_STEPPING
from splitft.specs.training import ServerAdapters

WORTH_DIVIDING = 0.01
"""Share of a round that more micro-batches must save; each has messages of its own."""


def quickest(problem: CutProblem) -> Decision:
    """Choose the quickest cuts from 1 to L, if the gain over the rounds left pays for the move."""
    if problem.simulate is None:
        best = best_cuts(problem, feasible(problem))
        decision = worth_moving(problem, best, partial(predicted_round_s, problem))
    else:
        simulate = _measured(problem)
        best, _ = best_in_space(problem, simulate)
        decision = worth_moving(problem, best, simulate)
    return replace(decision, reason=f"{decision.reason}{whole_models(problem, decision)}")


def best_in_space(
    problem: CutProblem, simulate: RoundSimulator, limit_s: float = math.inf
) -> tuple[dict[str, int], float]:
    """Return the quickest cuts and the seconds of their round; no cuts if none is quicker than `limit_s`.

    Raises ScheduleError if the server's memory does not suffice even with every client at its deepest cut.
    """
    tried = list(candidates(problem, feasible(problem)).all)
    split = _without_whole(problem)
    allowed = feasible(split)
    if all(found.cuts for found in allowed.values()):
        with contextlib.suppress(ScheduleError):  # the server may lack the memory to split every client
            tried += candidates(split, allowed).all
    return quickest_of(tried, simulate, limit_s) or ({}, limit_s)


def whole_models(problem: CutProblem, decision: Decision) -> str:
    """Return which clients are not split, as the end of a reason; "" if all are."""
    L = problem.clients[0].options[-1].cut
    whole = [name for name, cut in decision.cuts.items() if cut == L]
    if not whole:
        return ""
    who = "every client trains" if len(whole) == len(decision.cuts) else f"{', '.join(whole)}: trains"
    return f"; {who} the whole model (cut {L}) and is not split: only adapters travel"


# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunMode:
    """The choices that hold for a whole run."""

    adapters: ServerAdapters = "per-client"
    """How the server's factors step."""
    micro_batches: int = 1
    """Micro-batches of a step."""
    in_flight: int = 2
    """Micro-batches in progress at once."""

    def applied(self, costs: SharedCosts) -> SharedCosts:
        """Return the costs of a run in this mode."""
        server = replace(costs.server, adapters=self.adapters)
        return replace(costs, server=server, micro_batches=self.micro_batches, in_flight=self.in_flight)


@dataclass(frozen=True)
class ModeChoice:
    """The mode of a run, with the cuts that it was chosen for."""

    mode: RunMode
    seconds: float
    """Seconds of a round, divided by the progress of its steps."""
    cuts: dict[str, int]

    @property
    def round_s(self) -> float:
        """Seconds of a round."""
        return self.seconds * SERVER_STEPPING[self.mode.adapters].progress


def best_mode(
    ways: Sequence[ServerAdapters],
    divisions: Iterable[tuple[int, int]],
    problem_in: Callable[[RunMode], CutProblem],
) -> ModeChoice:
    """Return the quickest mode with its cuts; `problem_in` poses the problem of the first round in a mode.

    `divisions` are numbers of micro-batches and of those in flight; the first is compared for every way, and
    the others then for the best one. Ties go to what is named first.
    Raises ScheduleError if there are no cuts in any mode.
    """
    divisions = list(divisions)
    best: ModeChoice | None = None
    failed: ScheduleError | None = None
    for way in ways:
        try:
            found = _in_mode(RunMode(way, *divisions[0]), problem_in, best.seconds if best else math.inf)
        except ScheduleError as error:  # such as one copy a client, for which the server lacks memory
            failed = failed or error
            continue
        best = found or best
    if best is None:
        raise failed or ScheduleError("no way to step the server's factors was given to choose from")
    for parts, in_flight in divisions[1:]:
        mode = replace(best.mode, micro_batches=parts, in_flight=in_flight)
        best = _in_mode(mode, problem_in, best.seconds * (1 - WORTH_DIVIDING), [best.cuts]) or best
    return best


def _in_mode(
    mode: RunMode,
    problem_in: Callable[[RunMode], CutProblem],
    limit_s: float,
    tried: Sequence[dict[str, int]] = (),
) -> ModeChoice | None:
    """Return the best cuts in a mode, of those tried or of all, if they are quicker than `limit_s`."""
    problem, progress = problem_in(mode), SERVER_STEPPING[mode.adapters].progress
    simulate, limit_s = _measured(problem), limit_s * progress
    if tried:
        cuts, seconds = quickest_of(tried, simulate, limit_s) or ({}, limit_s)
    else:
        cuts, seconds = best_in_space(problem, simulate, limit_s)
    return ModeChoice(mode, seconds / progress, cuts) if cuts else None


def _measured(problem: CutProblem) -> RoundSimulator:
    """Return the problem's clock, with legs as long as they were measured."""
    if problem.simulate is None:
        raise ScheduleError("the modes of a run are chosen on the simulated clock, and the problem has none")
    return problem.simulate.with_ratios({one.name: measured_ratios(one) for one in problem.clients})


def _without_whole(problem: CutProblem) -> CutProblem:
    """Return the problem in which every client is split."""
    L = problem.clients[0].options[-1].cut
    split = (replace(one, max_cut=min(L - 1, one.max_cut or L)) for one in problem.clients)
    return replace(problem, clients=tuple(split))
