"""Makespan with a simulated clock: never slower on it than any common cut, and it stops moving."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedule.cases import WORK, client, costs, problems
from splitft.schedule.clock import client_round, simulate_round
from splitft.schedule.controllers import choose
from splitft.schedule.makespan import best_cuts, predicted_round_s
from splitft.schedule.problem import feasible, problem_of
from splitft.schedule.simulated_search import MOST_STEPS, round_simulator, shortlisted

fleets = st.lists(st.floats(0.05, 20), min_size=1, max_size=4)


def _seen(speeds, cuts=None):
    """Clients of these speeds, their problem, and the clock."""
    members = [client(f"c{number}", speed) for number, speed in enumerate(speeds)]
    problem = problem_of(costs(), members, cuts or [1] * len(members), rounds_left=10)
    return members, replace(problem, simulate=round_simulator(costs(), members))


def _on_the_clock(members, cuts):
    return simulate_round(
        [client_round(costs(), one, cuts[one.name]) for one in members], costs().server
    ).round_s


@settings(max_examples=10)
@given(fleets)
def test_no_common_cut_is_quicker_in_a_long_round(speeds):
    members = [
        client(f"c{n}", speed, workload=replace(WORK, steps=MOST_STEPS)) for n, speed in enumerate(speeds)
    ]
    problem = problem_of(costs(), members, [1] * len(members))
    chosen = shortlisted(problem, feasible(problem), round_simulator(costs(), members))
    common = min(_on_the_clock(members, dict.fromkeys(chosen, cut)) for cut in range(1, 6))
    assert _on_the_clock(members, chosen) <= common


@settings(max_examples=40)
@given(fleets)
def test_no_common_cut_is_quicker_on_the_clock(speeds):
    members, problem = _seen(speeds)
    chosen = shortlisted(problem, feasible(problem), problem.simulate)
    common = min(_on_the_clock(members, dict.fromkeys(chosen, cut)) for cut in range(1, 6))
    assert _on_the_clock(members, chosen) <= common


@settings(max_examples=40)
@given(fleets)
def test_with_constant_inputs_cuts_change_once_at_most(speeds):
    _, problem = _seen(speeds)
    first = choose("makespan", problem).cuts
    _, again = _seen(speeds, [first[f"c{number}"] for number in range(len(speeds))])
    assert choose("makespan", replace(again, rounds_left=9)).cuts == first


@given(problems())
def test_where_the_clock_is_the_model_its_exact_answer_is_met(problem):
    allowed = feasible(problem)

    def model(cuts, brief=False):
        return predicted_round_s(problem, cuts)

    chosen = shortlisted(problem, allowed, model)
    assert model(chosen) == model(best_cuts(problem, allowed))
    assert all(cut in allowed[name].cuts for name, cut in chosen.items())


def test_a_long_round_is_prolonged_from_a_short_one():
    steps = 3 * MOST_STEPS
    members = [client(f"c{n}", speed, workload=replace(WORK, steps=steps)) for n, speed in enumerate([1, 3])]
    cuts = {"c0": 2, "c1": 4}
    assert round_simulator(costs(), members)(cuts) == pytest.approx(_on_the_clock(members, cuts), rel=0.02)


def test_the_clock_too_takes_a_client_to_be_as_slow_as_it_measured():
    members, problem = _seen([4.0, 4.0], [5, 5])
    first, other = problem.clients
    predicted_s = first.option(5).seconds
    measured = {leg: 50 * predicted_s[leg] for leg in ("client_forward", "client_backward")}
    slow = replace(problem, clients=(replace(first, measured=measured), other))
    cuts = choose("makespan", slow).cuts
    assert cuts["c0"] < choose("makespan", problem).cuts["c0"]
    # the profile of a machine as slow as measured gives the same round
    slower = replace(members[0], device=members[0].device.scaled(1 / 50))
    ratios = {"c0": {"client_forward": 50, "client_backward": 50, "head": 50}}
    assert round_simulator(costs(), members).with_ratios(ratios)(cuts) == pytest.approx(
        round_simulator(costs(), [slower, members[1]])(cuts)
    )
