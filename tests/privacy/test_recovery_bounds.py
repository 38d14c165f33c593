"""The privacy constraint: no controller goes below the cut from which an audit's bound is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from schedule.cases import problems
from splitft.errors import ScheduleError
from splitft.privacy.recovery_bounds import check_kept, shallowest_cut
from splitft.schedule.controllers import CONTROLLERS, choose
from splitft.schedule.problem import feasible

TABLE = {1: 0.99, 2: 0.95, 4: 0.80, 8: 0.42, 15: 0.25}
tables = st.dictionaries(st.integers(1, 4), st.integers(0, 10).map(lambda tenth: tenth / 10), min_size=1)


@pytest.mark.parametrize(("bound", "cut"), [(1.0, 1), (0.95, 2), (0.5, 8), (0.42, 8), (0.3, 15)])
def test_the_bound_is_kept_from_the_first_audited_cut_that_keeps_it(bound, cut):
    assert shallowest_cut(TABLE, bound, deepest=29) == cut


def test_a_deeper_cut_that_came_out_worse_rules_out_the_ones_before_it():
    assert shallowest_cut({1: 0.5, 2: 0.2, 3: 0.4, 4: 0.1}, 0.3, deepest=4) == 4


def test_a_bound_that_no_cut_keeps_is_refused_with_what_each_cut_gives():
    with pytest.raises(ScheduleError, match=r"no cut up to 8.*cut 4 gives 0\.80, cut 8 gives 0\.42"):
        shallowest_cut(TABLE, 0.3, deepest=8)


@given(tables, st.integers(0, 10).map(lambda tenth: tenth / 10))
def test_every_audited_cut_from_the_bound_on_keeps_it_and_the_one_before_does_not(table, bound):
    try:
        floor = shallowest_cut(table, bound, deepest=4)
    except ScheduleError:
        assert table[max(table)] > bound
        return
    assert all(table[cut] <= bound for cut in table if cut >= floor)
    before = [cut for cut in table if cut < floor]
    assert not before or table[max(before)] > bound


@pytest.mark.parametrize("controller", sorted(set(CONTROLLERS) - {"fixed"}))
@given(problem=problems(), table=tables, bound=st.integers(0, 10).map(lambda tenth: tenth / 10))
def test_no_controller_chooses_a_cut_at_which_more_may_be_recovered(controller, problem, table, bound):
    try:
        floor = shallowest_cut(table, bound, deepest=4)
    except ScheduleError:
        assume(False)
    bounded = replace(
        problem,
        clients=tuple(replace(one, min_cut=max(one.min_cut, floor)) for one in problem.clients),
    )
    assume(all(found.cuts for found in feasible(bounded).values()))
    for cut in choose(controller, bounded).cuts.values():
        assert table[max(audited for audited in table if audited <= cut)] <= bound


def test_a_fixed_cut_below_the_bound_is_refused_with_the_cut_that_would_do():
    check_kept({"a": 8, "b": 20}, 8, TABLE, 0.5)
    with pytest.raises(ScheduleError, match=r"b cut 5 \(0\.80 by the audit\); .* of at least 8"):
        check_kept({"a": 8, "b": 5}, 8, TABLE, 0.5)
