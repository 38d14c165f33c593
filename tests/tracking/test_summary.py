"""The summary of a short run against sums done by hand."""

from __future__ import annotations

import json
import math

import pytest

from splitft.tracking.events import Evaluated, RoundDone, RunResumed, Traffic
from splitft.tracking.log import EventLog
from splitft.tracking.summary import (
    change_text,
    client_table,
    clock,
    headline,
    summarise,
    write_summary,
)
from tracking.story import ANN, BOB, started, step, story


@pytest.fixture
def summary() -> dict:
    return summarise(story())


def test_it_says_what_was_run(summary):
    keys = ("version", "method", "seed", "model", "labels", "finished", "rounds")
    assert [summary[key] for key in keys] == ["0.1.0", "splitft", 7, "tiny", "client", True, 2]
    assert summary["privacy"] == started().privacy
    assert summary["warnings"] == ["4 of 14 examples were cut off"]


def test_losses_are_one_before_training_and_one_after_each_round(summary):
    ann, bob = summary["clients"]
    assert summary["eval_loss"] == [4.0, 3.5, 3.0]
    assert ann["loss"] == [5.0, 4.5, 3.0]
    assert bob["loss"] == [3.5, 3.0, 3.75]
    assert summary["not_improved"] == [BOB]


def test_training_losses_are_weighted_by_tokens_and_missing_where_a_client_was_absent(summary):
    ann, bob = summary["clients"]
    assert ann["train_loss"] == [(4.0 * 10 + 3.0 * 30) / 40, 2.25]
    assert bob["train_loss"] == [(3.0 * 30 + 2.0 * 10) / 40, None]


def test_cuts_are_those_in_force_in_each_round(summary):
    ann, bob = summary["clients"]
    assert ann["cut"] == [2, 4]
    assert bob["cut"] == [3, 3]


def test_examples_and_tokens_are_what_was_trained_on(summary):
    ann, bob = summary["clients"]
    assert (ann["examples"], ann["tokens"]) == (8, 80)
    assert (bob["examples"], bob["tokens"]) == (4, 40)
    assert (ann["train_examples"], ann["train_tokens"], ann["eval_examples"], ann["truncated"]) == (
        9,
        90,
        1,
        4,
    )
    assert (summary["steps"], summary["tokens"]) == (6, 120)


def test_bytes_are_those_of_training_and_adapters_by_role_direction_and_client(summary):
    ann, bob = summary["clients"]
    assert summary["bytes"] == {
        "hidden": {"up": 720, "down": 600},
        "gradient": {"up": 480, "down": 720},
        "adapter": {"up": 4100, "down": 6200},
        "label": {"up": 0, "down": 0},
    }
    assert (ann["bytes_up"], ann["bytes_down"]) == (800 + 4000, 880 + 6000)
    assert (bob["bytes_up"], bob["bytes_down"]) == (400 + 100, 440 + 200)


def test_the_bytes_of_evaluation_stand_apart(summary):
    assert summary["evaluation_bytes"]["hidden"] == {"up": 77, "down": 0}


def test_seconds_are_by_leg_on_the_wall_and_on_the_simulated_clock(summary):
    assert summary["seconds_by_leg"] == {"client_forward": 1.5, "server_forward": 3.0}
    assert summary["wall_seconds"] == 30.0
    assert summary["simulated_seconds"] == 20.0
    assert summary["aggregation_error"] == [0.25, 0.0]


def test_wall_time_leaves_out_the_time_between_two_processes():
    before = [event for event in story() if event.t <= 113]
    resumed = [*before, RunResumed(t=1000, round=2), step(1007, 2, 2, ANN, 1.0, 1)]
    assert summarise(resumed)["wall_seconds"] == 13.0 + 7.0


def test_a_resumed_run_counts_what_it_did_again_only_once(summary):
    before = [event for event in story() if event.t <= 118]
    again = [event for event in story() if event.t >= 114]
    resumed = summarise([*before, RunResumed(t=200, round=2), *again])
    assert resumed["tokens"] == summary["tokens"]
    assert resumed["bytes"] == summary["bytes"]
    assert resumed["clients"] == summary["clients"]


def test_a_run_that_has_only_begun_is_told_as_far_as_it_is_known():
    summary = summarise([started()])
    assert (summary["finished"], summary["rounds"], summary["eval_loss"]) == (False, 0, [])
    assert [client["cut"] for client in summary["clients"]] == [[2], [3]]
    assert summary["simulated_seconds"] is None
    assert headline(summary) == "Held-out loss: not measured before and after."
    assert client_table(summary).rows[0] == (ANN, "2", "0", "0", "–", "–", "0.0", "0.0")


def test_without_a_beginning_there_is_nothing_to_tell():
    assert summarise([]) == {}
    assert summarise(story()[1:]) == {}


def test_numbers_that_are_not_finite_are_null_in_the_file(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log(started())
    log(step(1, 1, 0, ANN, math.nan, 3))
    log(RoundDone(round=1, participants=(ANN,), aggregation_error=math.inf, traffic={ANN: Traffic()}))
    log(Evaluated(round=0, loss=math.nan, by_client={ANN: math.inf}))
    log.close()
    summary = write_summary(tmp_path)
    data = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert data == summary
    assert data["eval_loss"] == data["aggregation_error"] == [None]
    assert [client["loss"] for client in data["clients"]] == [[None], [None]]
    assert data["clients"][0]["train_loss"] == [None]


def test_the_headline_names_the_change_and_who_did_not_gain(summary):
    assert headline(summary) == (
        "Held-out loss of all clients: 4.000 before, 3.000 after (-25.0 %). It did not fall on bob."
    )
    assert headline({**summary, "not_improved": []}).endswith("It fell on every client.")


def test_the_token_accuracy_stands_beside_the_loss_and_is_unknown_in_older_logs(summary):
    assert summary["eval_accuracy"] == [None] * 3
    assert "accuracy" not in headline(summary)
    told = [
        event.model_copy(update={"accuracy": share, "accuracy_by_client": {ANN: share}})
        for event in story()
        for share in ([0.25, 0.3, 0.5][event.round] if isinstance(event, Evaluated) else None,)
    ]
    known = summarise(told)
    assert known["eval_accuracy"] == [0.25, 0.3, 0.5]
    assert [one["accuracy"] for one in known["clients"]] == [[0.25, 0.3, 0.5], [None] * 3]
    assert "Token accuracy: 25.0 % before, 50.0 % after." in headline(known)


def test_the_headline_counts_those_who_did_not_gain_when_they_are_many(summary):
    clients = [f"client-{i}" for i in range(9)]
    text = headline({**summary, "clients": clients, "not_improved": clients[:7]})
    assert text.endswith("It did not fall on 7 of 9 clients.")


@pytest.mark.parametrize(
    ("losses", "text"),
    [([4.0, 3.0], "-25.0 %"), ([2.0, 2.5, 3.0], "+50.0 %"), ([], "–"), ([None, 1.0], "–"), ([0.0, 1.0], "–")],
)
def test_a_change_is_told_in_per_cent_where_there_is_one(losses, text):
    assert change_text(losses) == text


def test_each_client_has_a_row_of_text_under_the_headings(summary):
    table = client_table(summary)
    assert all(len(row) == len(table.headings) for row in table.rows)
    assert table.rows[0] == (ANN, "2 → 4", "8", "80", "5.000", "3.000", "0.0", "0.0")


@pytest.mark.parametrize(
    ("cuts", "text"),
    [([3, 3, 3], "3"), ([2, 4, 2], "2 → 4 → 2"), ([1, 2, 3, 4], "1 → … → 4")],
)
def test_moving_cuts_are_told_in_order(summary, cuts, text):
    client = {**summary["clients"][0], "cut": cuts}
    assert client_table({"clients": [client]}).rows[0][1] == text


def test_seconds_read_as_a_clock():
    assert [clock(s) for s in (0, 59.6, 3661)] == ["0:00:00", "0:01:00", "1:01:01"]
