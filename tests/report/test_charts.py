"""Charts stay legible and light with many clients and many steps."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitft.report.charts import (
    MAX_COLORED,
    MAX_POINTS,
    mean_by_step,
    one_run_charts,
    thinned,
    training_loss,
)
from splitft.tracking.summary import summarise
from tracking.story import ANN, BOB, started, step, story

VALUES = st.lists(st.floats(0, 100), min_size=1, max_size=60)


@given(VALUES, st.integers(1, 20))
def test_a_thinned_line_has_few_points_within_those_it_stands_for(values, most):
    xs, ys = thinned((range(len(values)), values), most)
    assert len(xs) == len(ys) <= most
    assert list(xs) == sorted(set(xs))
    assert xs[0] == 0
    window = math.ceil(len(values) / most)
    for x, y in zip(xs, ys, strict=True):
        part = values[x : x + window]
        assert y == pytest.approx(sum(part) / len(part))


def test_a_short_line_stays_as_it_is_and_gaps_stay_gaps():
    assert thinned(([0, 1, 2], [1.0, None, 3.0]), 3) == ([0, 1, 2], [1.0, None, 3.0])
    assert thinned((range(4), [None, None, 1.0, math.nan]), 2) == ([0, 2], [None, 1.0])


def test_the_mean_of_a_step_is_weighted_by_tokens_over_whoever_took_it():
    steps = [step(1, 1, 0, ANN, 4.0, 10), step(2, 1, 0, BOB, 3.0, 30), step(3, 1, 1, ANN, 2.0, 5)]
    assert mean_by_step([*steps, step(4, 1, 1, BOB, math.nan, 99)]) == ([0, 1], [3.25, 2.0])


def test_a_long_run_is_drawn_with_a_bounded_number_of_points():
    chart = training_loss([step(n, 1, n, ANN, 2.0, 10) for n in range(5000)])
    (trace,) = chart.data
    assert MAX_POINTS / 2 < len(trace["x"]) <= MAX_POINTS


@pytest.mark.parametrize("clients", [MAX_COLORED, MAX_COLORED + 1])
def test_a_crowd_of_clients_is_drawn_faint_and_without_a_legend(clients):
    chart = training_loss([step(n, 1, 0, f"client-{n:02}", float(n), 10) for n in range(clients)])
    *each, together = chart.data
    assert len(each) == clients
    assert {trace["showlegend"] for trace in each} == {clients <= MAX_COLORED}
    assert together["name"] == "all clients"
    assert list(together["y"]) == [(clients - 1) / 2]


def test_a_run_of_many_rounds_has_a_dozen_ticks_at_most():
    summary = summarise(story()) | {"eval_loss": [1.0] * 301}
    held_out = one_run_charts(summary, story(), 6)[0]
    assert held_out.layout["xaxis"]["dtick"] == 26


def test_what_has_nothing_to_show_is_not_drawn():
    titles = [chart.title for chart in one_run_charts(summarise([started()]), [started()], 6)]
    assert titles == ["Cuts"]
