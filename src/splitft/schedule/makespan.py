"""The cuts with the least predicted round time, found exactly.

    round(k_1 .. k_n) = max( max_i own_i(k_i),  sum_i server_i(k_i) )

own_i is client i's round from its first leg to its last without waiting for others; server_i the server's
work for it. No round is shorter than either, if groups save no overhead. The model leaves out two effects:
clients wait for the server while it is not full, which makes a round longer, and groups share their overhead,
which makes it shorter. `clock` simulates both, and `simulated_search` uses it.

A search over one number is exact. Let the round take at most T. The possible cuts of client i are those with
own_i <= T, and the deepest of them leaves the server the least work and memory, for any cuts of the others.
So T can be met if and only if those cuts meet it. A larger T allows more cuts, hence binary search. Nothing
changes between two neighbouring values of own_i, so those values are the only T to try. This holds for any
own_i, also if it falls with depth; server work and memory must not rise with depth, which is checked.

Ties go to the deeper cut: every client gets its deepest cut of at most the best T (deeper reveals less). It
follows that a slower client never gets a deeper cut than it would if it were faster, all else equal. If
T' > T is needed because i is slower, the reason is that its old cut k now takes longer than T, and
T' <= own_i'(k). A deeper k' with own_i'(k') <= T' would have own_i(k') <= own_i(k) <= T, since slowness
costs the deeper cut at least as many seconds as the shallower: it would have been chosen before.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from itertools import pairwise

from splitft.errors import ScheduleError
from splitft.schedule.problem import CutOption, CutProblem, Feasible, corrected

Prices = dict[str, list[CutOption]]
"""The possible options of each client, ascending in depth."""


def predicted_round_s(problem: CutProblem, cuts: Mapping[str, int]) -> float:
    """Return the seconds of a round with these cuts, by the model above."""
    chosen = [
        option
        for client in problem.clients
        for option in corrected(client)
        if option.cut == cuts[client.name]
    ]
    return _round_s(chosen)


def best_cuts(problem: CutProblem, allowed: Mapping[str, Feasible]) -> dict[str, int]:
    """Return the allowed cuts with the least predicted round time; ties go to the deeper cut.

    Raises ScheduleError if the server's memory does not suffice even with every client at its deepest cut.
    """
    prices = prices_of(problem, allowed)
    own_s = sorted({option.own_s for options in prices.values() for option in options})
    start_s = max(min(option.own_s for option in options) for options in prices.values())
    times = own_s[own_s.index(start_s) :]  # with less time some client has no cut
    if not fits_memory(problem, _cuts(deepest(prices, times[-1]))):
        _raise_lack(problem, deepest(prices, times[-1]))

    def met(time_s: float) -> bool:
        options = deepest(prices, time_s)
        return _round_s(options.values()) <= time_s and fits_memory(problem, _cuts(options))

    first = bisect_left(times, True, key=met)
    best_s = times[first] if first < len(times) else float("inf")
    if first > 0:  # between two values the server's work alone determines the time
        before = deepest(prices, times[first - 1])
        if fits_memory(problem, _cuts(before)):
            best_s = min(best_s, _round_s(before.values()))
    return _cuts(deepest(prices, best_s))


def prices_of(problem: CutProblem, allowed: Mapping[str, Feasible]) -> Prices:
    """Return the allowed options of each client.

    Raises ScheduleError if a client has none, or if a deeper cut costs the server more.
    """
    prices: Prices = {}
    for client in problem.clients:
        possible = [option for option in corrected(client) if option.cut in allowed[client.name].cuts]
        if not possible:
            raise ScheduleError(f"{allowed[client.name].lack}; leave it out, or give it more")
        for shallow, deep in pairwise(possible):
            if deep.server_s > shallow.server_s or deep.server_bytes > shallow.server_bytes:
                raise ScheduleError(
                    f"client {client.name!r}: cut {deep.cut} costs the server more than cut {shallow.cut} "
                    f"({deep.server_s:.4g} s and {shallow.server_s:.4g} s, {deep.server_bytes:.4g} and "
                    f"{shallow.server_bytes:.4g} bytes); makespan needs prices that do not rise with depth"
                )
        prices[client.name] = possible
    return prices


def deepest(prices: Prices, time_s: float) -> dict[str, CutOption]:
    """Return each client's deepest option of at most this time."""
    return {
        name: next(option for option in reversed(options) if option.own_s <= time_s)
        for name, options in prices.items()
    }


def _round_s(chosen: Iterable[CutOption]) -> float:
    options = list(chosen)
    return max(max(option.own_s for option in options), sum(option.server_s for option in options))


def fits_memory(problem: CutProblem, cuts: Mapping[str, int]) -> bool:
    """Return whether the server has the memory for these cuts."""
    return problem.server_bytes(cuts) <= problem.server_memory_bytes


def _raise_lack(problem: CutProblem, chosen: Mapping[str, CutOption]) -> None:
    cuts = _cuts(chosen)
    raise ScheduleError(
        f"the server lacks memory: with every client at its deepest possible cut "
        f"({', '.join(f'{name} {cut}' for name, cut in cuts.items())}) it needs "
        f"{problem.server_bytes(cuts) / 1e9:.3g} GB and has {problem.server_memory_bytes / 1e9:.3g} GB; "
        "let fewer clients take part, or give it more"
    )


def _cuts(chosen: Mapping[str, CutOption]) -> dict[str, int]:
    return {name: option.cut for name, option in chosen.items()}
