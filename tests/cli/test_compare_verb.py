"""`splitft compare` from end to end: cached, resumable, and strict about what compares."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from markupsafe import escape

import splitft
from runs import adapter_bytes, invoke, settings_file, started
from splitft.methods import METHODS

SHORT = {"training": {"rounds": 2, "steps": 2}}


@pytest.fixture
def file(tmp_path, tiny_llama):
    return settings_file(tmp_path, tiny_llama, **SHORT)


def test_a_comparison_is_its_runs_and_is_not_trained_twice(tmp_path, file):
    out = tmp_path / "out"
    arguments = ("compare", file, "--methods", "splitft", "--seeds", "0,7", "--out", out)
    done = invoke(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    assert "held-out loss" in done.stderr
    assert "0 runs left" in done.stderr
    told = json.loads(done.stdout)
    for run in told["runs"]:
        alone = splitft.train(file, tmp_path / f"alone-{run['seed']}", overrides=[f"seed={run['seed']}"])
        assert [point["loss"] for point in run["course"]] == alone.summary["eval_loss"]
        assert run["course"][-1]["simulated_s"] == pytest.approx(alone.summary["simulated_seconds"])
        sent = sum(sum(counts.values()) for counts in alone.summary["bytes"].values())
        assert run["course"][-1]["mb"] == pytest.approx(sent / 1e6)
    (method,) = told["methods"]
    assert (method["method"], method["seeds"], method["reached"]) == ("splitft", [0, 7], 2)
    assert method["server_reads"] == "hidden states"
    assert all(gb > 0 for gb in method["client_memory_gb"])
    page = (out / "compare.html").read_text(encoding="utf-8")
    assert "Loss by simulated time" in page
    assert json.loads((out / "compare.json").read_text()) == told

    before = {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*/events.jsonl")}
    again = invoke(*arguments)
    assert "2 of 2 runs are finished already" in again.stdout
    assert "splitft" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*/events.jsonl")} == before
    other = invoke(*arguments[:2], "training.lr=1e-3", *arguments[2:])
    assert other.exit_code == 0, other.stderr
    assert len(list((out / "runs").iterdir())) == 4, "another configuration has its own folders"


def test_after_ctrl_c_the_same_command_goes_on(tmp_path, tiny_llama):
    file = settings_file(tmp_path, tiny_llama, training={"rounds": 2, "steps": 6})
    out = tmp_path / "out"
    command = ("compare", file, "--methods", "splitft", "--seeds", 2, "--out", out)
    process = started(*command)
    deadline = time.monotonic() + 60
    while not any(
        '"event":"StepDone","round":2' in log.read_text()
        for log in out.glob("runs/splitft-seed1-*/events.jsonl")
    ):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert f"stopped; 1 of 2 runs are safe in {out}. Continue with" in said
    done = invoke(*command)
    assert done.exit_code == 0, done.stderr
    assert "1 of 2 runs are finished already" in done.stdout
    (stopped,) = out.glob("runs/splitft-seed1-*")
    whole = splitft.train(file, tmp_path / "whole", overrides=["seed=1"])
    assert adapter_bytes(stopped) == adapter_bytes(whole.folder)


def test_text_that_changed_between_two_calls_is_refused(tmp_path, file):
    out = tmp_path / "out"
    assert invoke("compare", file, "--methods", "splitft", "--out", out).exit_code == 0
    (first,) = (out / "runs").iterdir()
    text = tmp_path / "notes.jsonl"
    text.write_text(text.read_text().replace("ward", "bed"), encoding="utf-8")
    second = splitft.train(file, tmp_path / "second")
    done = invoke("report", first, second.folder)
    assert done.exit_code == 0
    assert "warning: these runs do not compare" in done.stderr
    assert "were evaluated on different text" in done.stderr
    page = (first / "report.html").read_text(encoding="utf-8")
    assert "These runs do not compare." in page


def test_what_cannot_be_compared_is_said_before_anything_is_trained(tmp_path, file):
    def refused(*arguments):
        done = invoke("compare", *arguments, "--out", tmp_path / "out")
        assert done.exit_code == 2, (done.stdout, done.exception)
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()
        return done.stderr

    assert "no method 'splitfit'; did you mean splitft?" in refused(file, "--methods", "splitfit")
    assert "give some of" in refused(file, "--methods", "magic")
    assert "no methods to compare" in refused(file, "--methods", ",")
    assert "is named twice" in refused(file, "--methods", "splitft,splitft")
    assert "split: " in refused(file, "training.participation=0.5", "--methods", "splitft,split")
    for seeds in ("0", ",", ""):
        assert "the list of seeds is empty" in refused(file, "--methods", "splitft", "--seeds", seeds)
    assert "give their number, such as 3" in refused(file, "--methods", "splitft", "--seeds", "a,b")
    assert "did you mean rounds?" in refused(file, "training.rouns=1", "--methods", "splitft")
    assert "gone.yaml" in refused(tmp_path / "gone.yaml", "--methods", "splitft")


def test_the_models_can_be_tried_on_a_task_too(tmp_path, tiny_llama):
    rows = [{"mr": f"n{n}", "ref": f"the ward {n}"} for n in range(12)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"source": str(pairs), "prompt": "mr", "completion": "ref"}
    file = settings_file(tmp_path, tiny_llama, data=data, training={"rounds": 1, "steps": 1})
    arguments = ("compare", file, "--methods", "splitft,local", "--tasks", "e2e", "--out", tmp_path / "out")
    told = json.loads(invoke(*arguments, "--json").stdout)
    assert told["methods"][1]["metrics"] == {}, "of local there is no one model"
    run = told["runs"][0]
    (kept,) = json.loads((Path(run["folder"]) / "eval.json").read_text())["evaluations"]
    assert told["methods"][0]["metrics"] == {
        key: [kept["metrics"][key]] for key in ("bleu", "chrf", "rouge_l")
    }
    again = invoke(*arguments)
    assert "ROUGE-L" in again.stdout
    assert "e2e:" not in again.stdout, "it is not measured twice"
    done = invoke("compare", file, "--methods", "splitft", "--tasks", "magic", "--out", tmp_path / "out")
    assert (done.exit_code, "there is no task 'magic'" in done.stderr) == (2, True)


def test_all_methods_are_tried_on_the_same_held_out_text(tmp_path, tiny_llama):
    file = settings_file(tmp_path, tiny_llama, training={"rounds": 1, "steps": 1})
    done = invoke("compare", file, "--methods", "all", "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert [one["method"] for one in told["methods"]] == list(METHODS)
    before = {round(one["loss_before"][0], 3) for one in told["methods"]}
    assert len(before) == 1, "untrained, all methods are the same model"
    reads = {one["method"]: one["server_reads"] for one in told["methods"]}
    assert reads["centralized"] == "all the text"
    assert reads["local"] == "nothing"
    assert reads["fedlora"] == "adapters"
    assert reads["splitlora"] == "the text"
    assert reads["splitft"] == "hidden states"
    page = (tmp_path / "out/compare.html").read_text(encoding="utf-8")
    assert escape(METHODS["splitlora"].difference) in page
