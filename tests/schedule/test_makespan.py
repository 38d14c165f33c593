"""Makespan against brute force over all cut vectors."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedule.cases import client, costs, option, problems
from splitft.errors import ScheduleError
from splitft.schedule.controllers import choose
from splitft.schedule.makespan import best_cuts, predicted_round_s
from splitft.schedule.problem import ClientChoices, CutProblem, feasible, problem_of


def _possible(problem: CutProblem) -> list[dict[str, int]]:
    """Every vector of allowed cuts that fits the server's memory."""
    allowed = feasible(problem)
    vectors = (
        dict(zip(allowed, cuts, strict=True)) for cuts in product(*(one.cuts for one in allowed.values()))
    )
    return [cuts for cuts in vectors if problem.server_bytes(cuts) <= problem.server_memory_bytes]


@given(problem=problems(), budget=st.integers(0, 60), weights=st.lists(st.integers(0, 20), min_size=5))
def test_makespan_equals_brute_force_also_when_the_servers_memory_binds(problem, budget, weights):
    shared = tuple(float(held) for held in sorted(weights[:5], reverse=True))
    problem = replace(problem, server_memory_bytes=float(budget), server_weights_bytes=shared)
    possible = _possible(problem)
    if not possible:
        with pytest.raises(ScheduleError, match="the server lacks memory"):
            best_cuts(problem, feasible(problem))
        return
    best = best_cuts(problem, feasible(problem))
    best_s = predicted_round_s(problem, best)
    assert best in possible
    assert best_s == min(predicted_round_s(problem, cuts) for cuts in possible)
    tied = [cuts for cuts in possible if predicted_round_s(problem, cuts) == best_s]
    for name, cut in best.items():  # ties go to the deeper cut
        assert cut == max(cuts[name] for cuts in tied)


@given(problems())
def test_makespan_is_never_worse_than_the_best_common_cut(problem):
    best_s = predicted_round_s(problem, best_cuts(problem, feasible(problem)))
    for cuts in _possible(problem):
        if len(set(cuts.values())) == 1:
            assert best_s <= predicted_round_s(problem, cuts)


@given(problems())
def test_makespan_moves_only_if_the_gain_pays_for_the_move(problem):
    current = {one.name: one.current for one in problem.clients}
    decision = choose("makespan", problem)
    if decision.cuts != current and current in _possible(problem):
        gain_s = predicted_round_s(problem, current) - predicted_round_s(problem, decision.cuts)
        assert gain_s * problem.rounds_left > max(
            one.option(decision.cuts[one.name]).move_s for one in problem.clients
        )


@settings(max_examples=50)
@given(st.lists(st.floats(0.05, 20), min_size=1, max_size=3), st.floats(0.1, 0.9))
def test_with_predicted_costs_too_makespan_is_exact_and_a_slower_client_is_not_deeper(speeds, slower):
    def problem(speeds):
        members = [client(f"c{number}", speed) for number, speed in enumerate(speeds)]
        return problem_of(costs(), members, [1] * len(members), rounds_left=10)

    fast = problem(speeds)
    best = best_cuts(fast, feasible(fast))
    assert predicted_round_s(fast, best) == min(predicted_round_s(fast, cuts) for cuts in _possible(fast))
    slow = problem([speeds[0] * slower, *speeds[1:]])
    assert best_cuts(slow, feasible(slow))["c0"] <= best["c0"]


def test_makespan_gives_a_client_that_measures_slow_a_shallower_cut():
    prices = tuple(option(cut, 10 * cut, 40 - 10 * cut) for cut in range(1, 4))
    one = ClientChoices("a", 3, prices)
    two = replace(one, name="b")
    problem = CutProblem((one, two), rounds_left=10)
    assert choose("makespan", problem).cuts == {"a": 3, "b": 3}
    slow = replace(problem, clients=(replace(one, measured={"client_forward": 300.0}), two))
    decision = choose("makespan", slow)
    assert decision.cuts == {"a": 1, "b": 3}
    assert "predicted round 130 s instead of 310 s" in decision.reason


def test_prices_that_rise_with_depth_at_the_server_are_refused():
    odd = ClientChoices("a", 1, (option(1, 1, 5), option(2, 2, 6)))
    with pytest.raises(ScheduleError, match="cut 2 costs the server more than cut 1"):
        choose("makespan", CutProblem((odd,)))
