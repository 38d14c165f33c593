"""The simulated clock's charts show the recorded seconds, and stay legible however long the round."""

from __future__ import annotations

import pytest

from splitft.report.timeline import (
    BARS_PER_ROW,
    MAX_CLIENTS,
    clock_charts,
    machine_table,
    one_round,
    seconds_by_client,
    seconds_by_round,
)
from splitft.tracking.events import Bar, RoundTimed
from tracking.story import ANN, BOB, timed


def long_round(clients: int, steps: int) -> RoundTimed:
    """Steps of one second forward and one backward, all clients at once."""
    names = [f"client-{number}" for number in range(clients)]
    bars = [
        Bar(who=name, leg=leg, start=2 * step + half, end=2 * step + half + 1)
        for step in range(steps)
        for half, leg in enumerate(("client_forward", "client_backward"))
        for name in names
    ]
    return timed(1, 1, 2.0 * steps + 1).model_copy(
        update={"bars": tuple(bars), "legs": {name: {"client_forward": 1.0} for name in names}}
    )


def test_a_round_is_drawn_bar_by_bar_a_trace_each_leg():
    chart = one_round([timed(1, 1, 6.0)])
    drawn = {
        (trace["name"], who, start, start + length)
        for trace in chart.data
        for who, start, length in zip(trace["y"], trace["base"], trace["x"], strict=True)
    }
    assert drawn == {
        ("client forward", ANN, 0.0, 1.0),
        ("wait", ANN, 1.0, 2.0),
        ("server forward", ANN, 2.0, 4.0),
        ("server forward", "server", 2.0, 4.0),
        ("client backward", ANN, 4.0, 5.0),
    }
    assert [trace["name"] for trace in chart.data][-1] == "wait"
    assert [trace["marker"]["opacity"] < 1 for trace in chart.data] == [False, False, False, True]
    assert list(chart.layout["yaxis"]["categoryarray"]) == [ANN, "server"]


def test_the_last_round_that_was_recorded_is_drawn():
    bare = timed(3, 3, 6.0).model_copy(update={"bars": ()})
    assert one_round([timed(1, 1, 6.0), timed(2, 2, 6.0), bare]).caption.startswith("Round 2:")
    assert [chart.title for chart in clock_charts([bare])] == [
        "Seconds by round",
        "Seconds by leg and client",
    ]


def test_of_a_long_round_the_beginning_is_drawn_and_the_chart_says_so():
    chart = one_round([long_round(clients=2, steps=100)])
    ends = [
        start + length
        for trace in chart.data
        for start, length in zip(trace["base"], trace["x"], strict=True)
    ]
    assert len(ends) <= 3 * BARS_PER_ROW
    assert max(ends) == 60, "120 bars of a second, two at a time"
    assert (
        "Shown is its beginning, 60 s of 200 s, in which each client does 30 of 100 steps." in chart.caption
    )


def test_of_a_crowd_the_first_clients_are_drawn_and_the_chart_says_so():
    chart = one_round([long_round(clients=MAX_CLIENTS + 5, steps=2)])
    assert {who for trace in chart.data for who in trace["y"]} == {f"client-{n}" for n in range(MAX_CLIENTS)}
    assert f"Shown are the first {MAX_CLIENTS} of {MAX_CLIENTS + 5} clients." in chart.caption
    exact = one_round([long_round(clients=MAX_CLIENTS, steps=2)])
    assert "Shown" not in exact.caption


def test_moving_blocks_stands_apart_from_the_round():
    chart = seconds_by_round([timed(1, 1, 12.0), timed(2, 2, 8.0)])
    assert {trace["name"]: list(trace["y"]) for trace in chart.data} == {
        "the round": [11.0, 7.0],
        "moving blocks": [1.0, 1.0],
    }


def test_seconds_of_all_rounds_are_stacked_by_leg():
    other = timed(2, 2, 8.0).model_copy(update={"legs": {BOB: {"wait": 5.0}}})
    chart = seconds_by_client([timed(1, 1, 12.0), other])
    assert {trace["name"]: dict(zip(trace["y"], trace["x"], strict=True)) for trace in chart.data} == {
        "client forward": {ANN: 2.0, BOB: 0.0},
        "wait": {ANN: 1.0, BOB: 5.0},
    }


def test_idle_is_a_share_of_the_rounds_that_one_took_part_in():
    without_ann = timed(2, 2, 8.0).model_copy(update={"idle": {"server": 0.4}})
    table = machine_table([timed(1, 1, 13.0), without_ann], {BOB: "a phone"})
    rows = {who: idle for who, idle, _ in table.rows}
    assert rows == {ANN: "25.0 %", "server": f"{100 * 4.4 / 19:.1f} %", BOB: "–"}


@pytest.mark.parametrize("rounds", [[], [timed(1, 1, 1.0).model_copy(update={"legs": {}, "bars": ()})]])
def test_what_took_no_time_is_not_drawn(rounds):
    assert all(chart.title == "Seconds by round" for chart in clock_charts(rounds))
