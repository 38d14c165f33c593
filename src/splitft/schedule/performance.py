"""Cuts by performance: clients whose held-out loss is better than the mean go deeper, others shallower.

    paper         cut_i <- cut_i + steps       steps from the deviation of loss_i; it drifts to the bounds
    performance   cut_i <- base_i x ratio_i    ratio from the same deviation; it comes to rest

SplitFT (arXiv 2604.26388) describes the idea: a client whose performance is above the average of all clients
gets more layers, one below it fewer; each client has a weight; a step size gamma scales the change; resources
bound it. The abstract has no formula and no code is public, so both formulas are our reading.

With equal ranks in all blocks a cut changes no loss (`tests/laws/test_cut_invariance.py`). Then nothing that
these rules do returns to them as a better or a worse loss: only with a lower rank at the cut do cuts change
quality. `benchmarks/paper_rule.py` measures by how much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from splitft.schedule.controllers import Decision, resources
from splitft.schedule.problem import CutProblem, Feasible, feasible

MOST_DEPTH = 2.0
"""Largest factor between the cut of `performance` and that of `resources`, up or down."""


def paper(problem: CutProblem) -> Decision:
    """Move cuts by performance, in steps of at most gamma blocks: the rule of SplitFT (arXiv 2604.26388).

        cut_i <- cut_i + round(gamma (mean - loss_i) / max_j |mean - loss_j|)

    with performance = minus the held-out loss, the mean taken with the clients' weights, and the deviation in
    units of the largest, so that gamma is in blocks whatever the scale of the losses. Halves are rounded away
    from 0. "Within resources" means cuts that fit the client's memory, bounds and compute time.

    With gamma 1 every client whose deviation is at least half the largest moves by one block. The steps do
    not depend on the cuts, and the largest deviation is always a whole gamma, however small it is. So with
    constant losses a client that moves once moves in every round, and rests only at a bound: the only fixed
    points are the bounds (`performance` has others).
    """
    current, allowed = _current(problem), feasible(problem)
    if lacking := _without_loss(problem):
        return Decision(
            {name: nearest_cut(allowed[name], cut) for name, cut in current.items()}, f"{lacking}cuts stay"
        )
    losses, mean = _losses(problem), mean_loss(problem)
    largest = max(abs(mean - loss) for loss in losses.values())
    if largest <= 1e-12 * abs(mean):
        steps = dict.fromkeys(losses, 0)
    else:
        steps = {name: _rounded(problem.gamma * (mean - loss) / largest) for name, loss in losses.items()}
    cuts = {name: nearest_cut(allowed[name], cut + steps[name]) for name, cut in current.items()}
    moved = _moves(current, cuts)
    if any(cuts[name] != cut for name, cut in current.items()):
        moved += "; such losses move them on every round, to their bounds"
    held = [name for name, cut in current.items() if steps[name] and cuts[name] == cut]
    return Decision(
        cuts, f"mean loss {mean:.4g}; {moved}{f'; held at a bound: {_listed(held)}' if held else ''}"
    )


def performance(problem: CutProblem) -> Decision:
    """Give clients the cuts of `resources`, deeper or shallower in proportion to their performance.

        wanted_i = base_i (mean / loss_i)^gamma       at most MOST_DEPTH times deeper or shallower
        cut_i   <- wanted_i, rounded, if it is a block or more away from cut_i; else cut_i stays

    base_i is the cut of `resources`, mean that of `paper`. The wanted cut depends on the losses alone and not
    on the cuts before (in a run, `client_blocks` is given), so constant losses move a client once at most:
    every cut within a block of the wanted one is a fixed point, and noise of less than a block moves nothing.
    """
    current, allowed = _current(problem), feasible(problem)
    base = resources(problem)
    if lacking := _without_loss(problem):
        return Decision(base.cuts, f"{lacking}only resources count: {base.reason}")
    losses, mean = _losses(problem), mean_loss(problem)
    if min(losses.values()) <= 0:
        return Decision(base.cuts, f"a loss is not above 0, so only resources count: {base.reason}")
    most, cuts = math.log(MOST_DEPTH), {}
    for name, cut in current.items():
        deviation = problem.gamma * math.log(mean / losses[name])
        wanted = base.cuts[name] * math.exp(max(-most, min(most, deviation)))
        stays = abs(wanted - cut) < 1 and cut in allowed[name].cuts
        cuts[name] = cut if stays else nearest_cut(allowed[name], _rounded(wanted))
    based = ", ".join(f"{name} {cut}" for name, cut in base.cuts.items())
    return Decision(cuts, f"mean loss {mean:.4g}; {_moves(current, cuts)}; cuts by resources: {based}")


def mean_loss(problem: CutProblem) -> float:
    """Return the mean of the clients' losses by their weights. Every client must have a loss."""
    weights = {client.name: client.weight for client in problem.clients}
    return sum(weights[name] * loss for name, loss in _losses(problem).items()) / sum(weights.values())


def nearest_cut(found: Feasible, wanted: int) -> int:
    """Return the deepest possible cut of at most `wanted`, or the shallowest of all."""
    return max((cut for cut in found.cuts if cut <= wanted), default=min(found.cuts))


def _current(problem: CutProblem) -> dict[str, int]:
    return {client.name: client.current for client in problem.clients}


def _losses(problem: CutProblem) -> dict[str, float]:
    return {client.name: client.loss for client in problem.clients if client.loss is not None}


def _without_loss(problem: CutProblem) -> str:
    """Return the beginning of a reason that names the clients without a loss; "" if all have one."""
    lacking = [client.name for client in problem.clients if client.loss is None]
    if not lacking:
        return ""
    every = len(lacking) == len(problem.clients)
    return "no losses yet, so " if every else f"no loss to go by of {', '.join(lacking)}, so "


def _moves(current: Mapping[str, int], cuts: Mapping[str, int]) -> str:
    up = [name for name in cuts if cuts[name] > current[name]]
    down = [name for name in cuts if cuts[name] < current[name]]
    return f"better, so deeper: {_listed(up)}; worse, so shallower: {_listed(down)}"


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _rounded(value: float) -> int:
    """Round to the nearest whole number, halves away from 0, so that up and down are symmetric."""
    return int(math.copysign(math.floor(abs(value) + 0.5), value))
