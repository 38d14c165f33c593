"""Controllers of the cuts: each is a pure function from a CutProblem to a Decision.

    fixed       the cuts as given
    resources   the same number of blocks on all clients together, distributed for equal compute times
    paper       deeper for clients better than the mean, shallower for worse ones (`performance`)
    performance the cuts of resources, deeper or shallower in proportion to performance (`performance`)
    makespan    least predicted round time under memory, bounds and the server's capacity (`makespan`)
    quickest    the same over the whole design space, with the whole model on a client (`design_space`)

`choose` runs one by its name and checks its decision. A plug-in adds its own with
`CONTROLLERS.add("mine", Controller(choose=function))`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from splitft.errors import ScheduleError, SplitftError
from splitft.schedule.makespan import best_cuts, predicted_round_s
from splitft.schedule.problem import CutProblem, corrected, feasible, measured_ratios
from splitft.schedule.simulated_search import shortlisted
from splitft.specs.schedule import CONTROLLERS, Controller

__all__ = ["CONTROLLERS", "Controller", "Decision", "checked", "choose"]


@dataclass(frozen=True)
class Decision:
    """The cuts of the next round."""

    cuts: Mapping[str, int]
    """k of each client, by name."""
    reason: str
    """The explanation, for the report."""


def fixed(problem: CutProblem) -> Decision:
    """Keep the cuts as they are."""
    return Decision(_current(problem), "the cuts are fixed")


def resources(problem: CutProblem) -> Decision:
    """Distribute the blocks on clients so that all compute for about the same time.

    The level is the longest compute time T such that, with every client at its deepest cut of at most T
    seconds (or its shallowest allowed one), the clients together hold no more blocks than `client_blocks`.
    Losses, links and the server are not considered.
    """
    allowed = feasible(problem)
    prices = {
        client.name: {
            option.cut: option.compute_s
            for option in corrected(client)
            if option.cut in allowed[client.name].cuts
        }
        for client in problem.clients
    }
    blocks = problem.client_blocks
    if blocks is None:
        blocks = sum(client.current for client in problem.clients)
    cuts = {name: min(price) for name, price in prices.items()}
    reason = f"the shallowest cuts of all clients: {blocks} blocks do not suffice for deeper ones"
    for level_s in sorted({seconds for price in prices.values() for seconds in price.values()}):
        deeper = {
            name: max((cut for cut, seconds in price.items() if seconds <= level_s), default=min(price))
            for name, price in prices.items()
        }
        if sum(deeper.values()) > blocks:
            break
        cuts = deeper
        reason = f"{sum(cuts.values())} blocks on clients, {level_s:.3g} s of computing a round at most"
    return Decision(cuts, reason)


def makespan(problem: CutProblem) -> Decision:
    """Choose the least predicted round time, if the gain over the rounds left pays for the move.

    The prediction is the model of `makespan`, minimised exactly, or, with `problem.simulate`, the simulated
    clock, minimised over the candidates of `simulated_search`.

    All clients move at once, so a move takes as long as its longest part. A current cut that is no longer
    possible (less memory, a new bound) is left at any cost.
    """
    allowed = feasible(problem)
    if problem.simulate is None:
        return worth_moving(problem, best_cuts(problem, allowed), partial(predicted_round_s, problem))
    simulate = problem.simulate.with_ratios({one.name: measured_ratios(one) for one in problem.clients})
    return worth_moving(problem, shortlisted(problem, allowed, simulate), simulate)


def worth_moving(
    problem: CutProblem, best: Mapping[str, int], predict: Callable[[Mapping[str, int]], float]
) -> Decision:
    """Return the best cuts if the gain over the rounds left pays for the move, else the current ones."""
    current, allowed, best_s = _current(problem), feasible(problem), predict(best)
    if any(cut not in allowed[name].cuts for name, cut in current.items()):
        return Decision(best, f"a current cut is not possible any more; predicted round {best_s:.4g} s")
    if problem.server_bytes(current) > problem.server_memory_bytes:
        return Decision(best, f"the server lacks memory for the current cuts; predicted round {best_s:.4g} s")
    current_s = predict(current)
    gain_s = (current_s - best_s) * problem.rounds_left
    move_s = max(client.option(best[client.name]).move_s for client in problem.clients)
    against = f"{gain_s:.4g} s over {problem.rounds_left} rounds against {move_s:.4g} s of moving"
    if gain_s >= move_s:  # also where moving is free and gains nothing: ties go to the deeper cut
        return Decision(best, f"predicted round {best_s:.4g} s instead of {current_s:.4g} s: {against}")
    return Decision(current, f"predicted round {current_s:.4g} s; another gains {against}")


def choose(controller: str, problem: CutProblem) -> Decision:
    """Return the checked decision of the controller of this name.

    Raises PluginError if there is no such controller, and ScheduleError if a client has no possible cut
    (saying what it lacks), if the controller fails, or if its decision is impossible.
    """
    chosen = CONTROLLERS.find(controller)
    lacks = [found.lack for found in feasible(problem).values() if not found.cuts]
    if lacks:
        raise ScheduleError(f"{'; '.join(lacks)}; leave them out, or give them more")
    try:
        decision = chosen.choose(problem)
    except SplitftError:
        raise
    except Exception as error:  # a plug-in's own code may raise anything
        raise ScheduleError(f"controller {controller!r} failed: {type(error).__name__}: {error}") from error
    return checked(controller, problem, decision)


def checked(controller: str, problem: CutProblem, decision: Decision) -> Decision:
    """Return the decision if every client can have its cut and the server has the memory.

    Raises ScheduleError naming controller, client, cut and what fits.
    """
    if not isinstance(decision, Decision):
        raise ScheduleError(f"controller {controller!r} returned a {type(decision).__name__}, not a Decision")
    allowed = feasible(problem)
    if decision.cuts.keys() != allowed.keys():
        names = ", ".join(sorted(decision.cuts.keys() ^ allowed.keys()))
        raise ScheduleError(f"controller {controller!r} must give every client a cut, and no other: {names}")
    for name, cut in decision.cuts.items():
        found = allowed[name]
        if cut not in found.cuts:
            fits = f"cuts {_listed(found.cuts)} fit" if found.cuts else found.lack
            raise ScheduleError(f"controller {controller!r} gives client {name!r} cut {cut}, but {fits}")
    needed = problem.server_bytes(decision.cuts)
    if needed > problem.server_memory_bytes:
        raise ScheduleError(
            f"controller {controller!r}: with cuts {', '.join(f'{n} {c}' for n, c in decision.cuts.items())} "
            f"the server needs {needed / 1e9:.3g} GB of memory and has "
            f"{problem.server_memory_bytes / 1e9:.3g} GB; deeper cuts need less there"
        )
    return decision


def _current(problem: CutProblem) -> dict[str, int]:
    return {client.name: client.current for client in problem.clients}


def _listed(cuts: tuple[int, ...]) -> str:
    whole = len(cuts) > 2 and cuts[-1] - cuts[0] == len(cuts) - 1
    return f"{cuts[0]} to {cuts[-1]}" if whole else ", ".join(map(str, cuts))
