"""Controllers: the limits of all, and the properties of each."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedule.cases import client, costs, option, problems
from splitft.errors import PluginError, ScheduleError
from splitft.schedule.controllers import CONTROLLERS, Controller, Decision, checked, choose
from splitft.schedule.cost import LEGS
from splitft.schedule.makespan import best_cuts
from splitft.schedule.problem import (
    ClientChoices,
    CutProblem,
    feasible,
    problem_of,
)
from splitft.specs import ScheduleSpec

every_controller = pytest.mark.parametrize(
    "controller", sorted(name for name, one in CONTROLLERS.items() if one.adaptive)
)


def _moved(problem: CutProblem, cuts, rounds_left=None) -> CutProblem:
    """The next round: the same prices seen from the new cuts, moving costs what it did."""
    return replace(
        problem,
        clients=tuple(replace(one, current=cuts[one.name]) for one in problem.clients),
        rounds_left=max(0, problem.rounds_left - 1) if rounds_left is None else rounds_left,
    )


def _slower(problem: CutProblem, name: str, times: int) -> CutProblem:
    """The same problem with one client's processor that many times slower."""
    return replace(
        problem,
        clients=tuple(
            replace(
                one,
                options=tuple(
                    replace(price, seconds={**price.seconds, "client_forward": times * price.compute_s})
                    for price in one.options
                ),
            )
            if one.name == name
            else one
            for one in problem.clients
        ),
    )


@every_controller
@given(problem=problems())
def test_no_controller_leaves_bounds_or_memory(controller, problem):
    cuts = choose(controller, problem).cuts
    for one in problem.clients:
        cut = cuts[one.name]
        assert one.min_cut <= cut <= one.max_cut
        assert one.option(cut).client_bytes <= one.memory_bytes


@pytest.mark.parametrize("controller", ["fixed", "resources", "makespan"])
@given(problem=problems())
def test_with_constant_inputs_cuts_change_once_at_most(controller, problem):
    decide = CONTROLLERS[controller].choose
    first = decide(problem).cuts
    later = _moved(problem, first)
    for _ in range(5):
        assert decide(later).cuts == first
        later = _moved(later, first)


@given(problem=problems(), times=st.integers(2, 5), data=st.data())
def test_a_slower_client_never_gets_a_deeper_cut(problem, times, data):
    name = data.draw(st.sampled_from([one.name for one in problem.clients]))
    slower = _slower(problem, name, times)
    assert best_cuts(slower, feasible(slower))[name] <= best_cuts(problem, feasible(problem))[name]
    for controller in ("resources", "paper", "performance"):
        decide = CONTROLLERS[controller].choose
        assert decide(slower).cuts[name] <= decide(problem).cuts[name]


@given(problems())
def test_resources_puts_no_more_blocks_on_clients_than_given_or_needed(problem):
    cuts = CONTROLLERS["resources"].choose(problem).cuts
    given_blocks = sum(one.current for one in problem.clients)
    least = sum(found.cuts[0] for found in feasible(problem).values())
    assert sum(cuts.values()) <= max(given_blocks, least)


def test_resources_gives_a_machine_twice_as_fast_twice_the_blocks():
    members = [client("slow", 1.0), client("fast", 2.0)]
    problem = problem_of(costs(), members, [3, 3])
    assert choose("resources", problem).cuts == {"slow": 2, "fast": 4}
    assert choose("resources", replace(problem, client_blocks=3)).cuts == {"slow": 1, "fast": 2}


def _three(losses) -> CutProblem:
    prices = tuple(option(cut, cut, 9 - cut) for cut in range(1, 5))
    members = zip("abc", losses, strict=True)
    return CutProblem(tuple(ClientChoices(name, 2, prices, loss=loss) for name, loss in members))


@given(problem=problems(), times=st.integers(2, 5), data=st.data())
def test_a_client_that_measures_slower_than_predicted_never_gets_a_deeper_cut(problem, times, data):
    one = data.draw(st.sampled_from(problem.clients))
    predicted_s = one.option(one.current).seconds["client_forward"]
    slow = replace(one, measured={"client_forward": times * predicted_s})
    measured = replace(problem, clients=tuple(slow if c is one else c for c in problem.clients))
    assert (
        best_cuts(measured, feasible(measured))[one.name] <= best_cuts(problem, feasible(problem))[one.name]
    )
    resources = CONTROLLERS["resources"].choose
    assert resources(measured).cuts[one.name] <= resources(problem).cuts[one.name]


def test_resources_gives_a_client_that_measures_half_as_fast_half_the_blocks():
    problem = problem_of(costs(), [client("slow"), client("fast")], [3, 3])
    assert choose("resources", problem).cuts == {"slow": 3, "fast": 3}
    slow, fast = problem.clients
    measured = {leg: 2 * seconds for leg, seconds in slow.option(3).seconds.items() if LEGS[leg] == "client"}
    problem = replace(problem, clients=(replace(slow, measured=measured), fast))
    assert choose("resources", problem).cuts == {"slow": 2, "fast": 4}


def test_a_client_without_a_possible_cut_is_named_with_what_it_lacks():
    prices = tuple(option(cut, cut, 9 - cut, memory=cut * 1e9) for cut in range(1, 4))
    fine = ClientChoices("fine", 1, prices, memory_bytes=2e9)
    poor = ClientChoices("poor", 2, prices, min_cut=2, memory_bytes=5e8)
    far = ClientChoices("far", 2, prices, min_cut=7)
    late = ClientChoices("late", 2, prices, compute_s=0.5)
    found = feasible(CutProblem((fine, poor, far, late)))
    assert found["fine"].cuts == (1, 2)
    assert "client 'poor' lacks 1.5 GB: cut 2 takes 2 GB" in found["poor"].lack
    assert "allows cuts 7 to 3, but the model has 1 to 3" in found["far"].lack
    assert "'late' lacks time: cut 1 computes 1 s a round, and it may 0.5 s" in found["late"].lack
    with pytest.raises(ScheduleError, match=r"'poor' lacks 1.5 GB.*leave them out"):
        choose("fixed", CutProblem((fine, poor)))


def test_an_impossible_decision_does_not_get_out():
    prices = tuple(option(cut, cut, 9 - cut, server_memory=9e9 - cut * 1e9) for cut in range(1, 5))
    problem = CutProblem(
        (ClientChoices("a", 1, prices, min_cut=2), ClientChoices("b", 1, prices)),
        server_memory_bytes=15e9,
    )
    with pytest.raises(ScheduleError, match="'fixed' gives client 'a' cut 1, but cuts 2 to 4 fit"):
        choose("fixed", problem)
    with pytest.raises(ScheduleError, match="'mine' must give every client a cut, and no other: b"):
        checked("mine", problem, Decision({"a": 2}, ""))
    with pytest.raises(ScheduleError, match="cuts a 2, b 1 the server needs 15 GB of memory and has 14 GB"):
        checked("mine", replace(problem, server_memory_bytes=14e9), Decision({"a": 2, "b": 1}, ""))
    with pytest.raises(PluginError, match=r"no controller is called 'makespam'; did you mean makespan"):
        choose("makespam", problem)


@pytest.fixture
def added():
    yield lambda choose: CONTROLLERS.add("mine", Controller(choose))
    CONTROLLERS._things.pop("mine", None)


def test_a_controller_of_a_plug_in_chooses_by_its_name(added):
    added(lambda problem: Decision({one.name: one.options[0].cut for one in problem.clients}, "mine"))
    assert choose("mine", _three([1.0, 2.0, 3.0])).cuts == {"a": 1, "b": 1, "c": 1}
    assert ScheduleSpec(controller="mine").adaptive
    assert "mine" in ScheduleSpec.model_json_schema()["properties"]["controller"]["enum"]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda problem: {"a": 1}, "'mine' returned a dict, not a Decision"),
        (lambda problem: 1 // 0, "'mine' failed: ZeroDivisionError"),
        (lambda problem: Decision({"a": 1, "b": 1.5, "c": 1}, ""), "gives client 'b' cut 1.5, but"),
    ],
)
def test_a_controller_of_a_plug_in_that_fails_is_named(added, broken, message):
    added(broken)
    with pytest.raises(ScheduleError, match=message):
        choose("mine", _three([1.0, 2.0, 3.0]))


def test_no_controller_moves_the_whole_model_to_a_client():
    members = [client("a", 100.0), client("b", 100.0)]
    assert choose("makespan", problem_of(costs(), members, [1, 1], 100)).cuts == {"a": 5, "b": 5}
