"""Every method gets its best values, chosen on other text than its figures; a budget ends a run in time."""

from __future__ import annotations

import json
import math

import pytest

import splitft
from runs import adapter_bytes, invoke, settings_file
from splitft.compare.budget import Budget, history_of, train_within
from splitft.compare.rows import plan_row
from splitft.compare.tuning import choose, parse_grid, plan_candidates, rungs
from splitft.errors import ConfigError, RunError
from splitft.tracking.events import RunStarted, StepDone
from splitft.tracking.log import read_events

GRID = {"training.lr": ("1e-30", "1e-2", "3e-3")}
"""The first learns nothing."""


@pytest.fixture
def file(tmp_path, tiny_llama):
    return settings_file(
        tmp_path,
        tiny_llama,
        data={"holdout": 0.4},
        clients={"shares": {"by": "iid"}},
        training={"rounds": 4, "steps": 2},
    )


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [(2, [(8, 1)]), (3, [(4, 2), (8, 1)]), (4, [(4, 2), (8, 1)]), (5, [(2, 3), (4, 2), (8, 1)]),
     (9, [(1, 5), (2, 3), (4, 2), (8, 1)])],
)  # fmt: skip
def test_half_of_the_candidates_stop_at_every_rung_and_the_last_two_train_to_the_end(candidates, expected):
    assert rungs(candidates, 8) == expected


def test_the_worse_half_stops_early_and_the_best_is_chosen_as_if_trained_alone(tmp_path, file):
    candidates = plan_candidates(file, "splitft", 0, tmp_path / "out", [], GRID)
    choice = choose(candidates, Budget(), lambda row, event: None)
    by_lr = {one.values["training.lr"]: one for one in choice.tried}
    assert by_lr["1e-30"].rounds == 2, "it learnt nothing in half of the rounds"
    assert (by_lr["1e-2"].rounds, by_lr["3e-3"].rounds) == (4, 4)
    assert choice.values["training.lr"] == min(by_lr, key=lambda lr: by_lr[lr].loss)
    alone = splitft.train(by_lr["1e-2"].row.config, tmp_path / "alone")
    assert alone.summary["eval_loss"][-1] == by_lr["1e-2"].loss, "going on from a rung changes nothing"
    # nothing is trained twice
    steps = len(list(read_events(by_lr["1e-2"].row.folder / "events.jsonl")))
    again = choose(plan_candidates(file, "splitft", 0, tmp_path / "out", [], GRID), Budget(), _nothing_trains)
    assert again.values == choice.values
    assert len(list(read_events(by_lr["1e-2"].row.folder / "events.jsonl"))) == steps


def _nothing_trains(row, event):
    assert not isinstance(event, StepDone), row.name


def test_a_candidate_that_fails_is_out_and_if_all_fail_it_is_said(tmp_path, file):
    grid = {"training.lr": ("1e30", "1e-2")}
    choice = choose(
        plan_candidates(file, "fedlora", 0, tmp_path / "out", [], grid), Budget(), lambda *_: None
    )
    assert choice.values == {"training.lr": "1e-2"}
    (failed,) = [one for one in choice.tried if one.failed]
    assert math.isinf(failed.loss)
    assert choice.as_data()["tried"][0]["loss"] is None
    assert choice.at_edge == ["training.lr"]
    both = {"training.lr": ("1e30", "1e29")}
    with pytest.raises(RunError, match="fedlora: no candidate could be trained"):
        choose(plan_candidates(file, "fedlora", 0, tmp_path / "out", [], both), Budget(), lambda *_: None)


def test_keys_that_define_a_method_are_not_tuned_and_values_that_do_not_fit_are_left_out(tmp_path, file):
    grid = {"split.server_adapters": ("per-client", "shared"), "training.optimizer_state": ("reset", "keep")}
    free = plan_candidates(file, "splitft", 0, tmp_path, ["aggregate.rule=factors"], grid)
    assert len(free) == 4
    fixed = plan_candidates(file, "splitfed-v1", 0, tmp_path, [], grid)
    assert [one.values for one in fixed] == [
        {"training.optimizer_state": state} for state in ("reset", "keep")
    ]
    by_product = plan_candidates(file, "splitft", 0, tmp_path, ["aggregate.rule=svd"], grid)
    assert {one.values["training.optimizer_state"] for one in by_product} == {"reset"}
    with pytest.raises(ConfigError, match="nonsense"):
        plan_candidates(file, "splitft", 0, tmp_path, [], {"training.nonsense": ("1", "2")})


@pytest.mark.parametrize(
    ("options", "words"),
    [(["training.lr"], "give a key and two values"), (["training.lr=1e-3"], "two values"),
     (["training.lr=1e-3,1e-3"], "two values"), (["a.b=1,2", "a.b=3,4"], "names a.b twice")],
)  # fmt: skip
def test_what_is_no_grid_is_said(options, words):
    with pytest.raises(ConfigError, match=words):
        parse_grid(options)


def test_the_values_are_chosen_on_text_that_the_figures_are_not_of(tmp_path, file):
    out = tmp_path / "out"
    arguments = (
        "compare",
        file,
        "--methods",
        "splitft,fedlora",
        "--tune",
        "training.lr=1e-3,1e-2",
        "--out",
        out,
    )
    done = invoke(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert [one["method"] for one in told["tuning"]] == ["splitft", "fedlora"]

    def text_of(folder):
        started = next(one for one in read_events(folder / "events.jsonl") if isinstance(one, RunStarted))
        return started.clients

    tuned = [text_of(folder) for folder in (out / "tuning").iterdir()]
    final = [text_of(folder) for folder in (out / "runs").iterdir()]
    assert (len(tuned), len(final)) == (4, 2)
    for group in (tuned, final):  # all methods on the same text
        assert len({tuple((one.trained_on, one.held_out) for one in clients) for clients in group}) == 1
    for one, other in zip(tuned[0], final[0], strict=True):
        assert one.trained_on == other.trained_on, "neither half is trained on"
        assert one.held_out != other.held_out
    for one in told["tuning"]:
        (run,) = [run for run in told["runs"] if run["method"] == one["method"]]
        config = splitft.load(f"{run['folder']}/config.yaml")
        assert config.training.lr == float(one["chosen"]["training.lr"])
    shown = invoke(*arguments)
    assert shown.exit_code == 0, shown.stderr
    assert "chosen" in shown.stdout
    assert "at the edge of what was tried" in shown.stdout
    assert "Values chosen for each method" in (out / "compare.html").read_text(encoding="utf-8")


def test_a_run_ends_with_its_budget_and_goes_on_for_a_larger_one(tmp_path, file):
    config = plan_row(file, "splitft", 0, tmp_path, []).config
    whole = splitft.train(config, tmp_path / "whole")
    points = history_of(whole.folder)
    steps = [one for one in read_events(whole.folder / "events.jsonl") if isinstance(one, StepDone)]
    assert points[2].examples == sum(one.examples for one in steps if one.round <= 2) > 0
    seconds = (points[1].simulated_s + points[2].simulated_s) / 2
    short = train_within(config, tmp_path / "part", Budget(seconds=seconds))
    assert short == points[:2], "round 2 ends after the budget"
    assert history_of(tmp_path / "part") == points[:3]
    by_examples = train_within(config, tmp_path / "part", Budget(examples=points[3].examples))
    assert by_examples == points[:4]
    assert train_within(config, tmp_path / "part", Budget()) == points
    assert adapter_bytes(tmp_path / "part") == adapter_bytes(whole.folder)
    with pytest.raises(
        RunError, match=r"ends after 4 rounds, before the budget is spent.*raise training\.rounds"
    ):
        train_within(config, tmp_path / "part", Budget(seconds=1e9))
    with pytest.raises(ConfigError, match="--until-seconds 0"):
        Budget(seconds=0)


def test_methods_are_compared_after_the_same_simulated_time(tmp_path, file):
    out = tmp_path / "out"
    first = invoke("compare", file, "--methods", "splitft,splitfed-v1", "--out", out, "--json")
    assert first.exit_code == 0, first.stderr
    until = 1.01 * max(run["course"][1]["simulated_s"] for run in json.loads(first.stdout)["runs"])
    done = invoke(
        "compare", file, "--methods", "splitft,splitfed-v1", "--out", out, "--until-seconds", until, "--json"
    )
    assert done.exit_code == 0, done.stderr
    for run in json.loads(done.stdout)["runs"]:
        assert run["course"][-1]["simulated_s"] <= until
    early = invoke("compare", file, "--methods", "splitft", "--out", out, "--until-seconds", until / 1e3)
    assert early.exit_code == 2
    assert "its first round takes more than the budget" in early.stderr
    late = invoke("compare", file, "--methods", "splitft", "--out", out, "--until-seconds", 1e9)
    assert late.exit_code == 2
    assert "raise training.rounds" in late.stderr
