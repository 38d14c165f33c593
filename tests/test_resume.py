"""A run that was stopped anywhere and resumed ends as one that was never stopped, to the last bit."""

from __future__ import annotations

import os
import signal
import time

import pytest

import splitft
from laws.federations import write_text
from runs import StoppedError, adapter_bytes, settings, settings_file, started, stop_at
from splitft.config import from_mapping
from splitft.errors import RunError
from splitft.run import folder as run_folder
from splitft.tracking.events import Evaluated, RoundDone, RunResumed, StepDone, UpdatesBounded
from splitft.tracking.log import read_events


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


@pytest.fixture
def config(tiny_llama, text):
    def make(**sections):
        return from_mapping(settings(tiny_llama, text, **sections))

    return make


def _wait_for(process, file, words: str) -> None:
    """Until the file has a line with these words, while the process runs."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if file.exists() and words in file.read_text(encoding="utf-8"):
            return
        if process.poll() is not None:
            pytest.fail(f"ended before {words}: {process.communicate()}")
        time.sleep(0.005)
    pytest.fail(f"no {words} in a minute")


@pytest.mark.fault("kill -9 of `splitft train` within a round", "--resume ends with the same bytes")
def test_a_run_killed_in_a_round_resumes_from_the_last_and_ends_bit_for_bit(tmp_path, tiny_llama):
    file, out = settings_file(tmp_path, tiny_llama, training={"steps": 20}), tmp_path / "killed"
    process = started("train", file, "--out", out)
    _wait_for(process, out / "events.jsonl", '"event":"StepDone","round":2')
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert not any(isinstance(e, RoundDone) and e.round == 2 for e in read_events(out / "events.jsonl"))

    resumed = started("train", file, "--out", out, "--resume")
    assert (resumed.communicate()[1], resumed.returncode) == ("", 0)
    events = read_events(out / "events.jsonl")
    assert [event.round for event in events if isinstance(event, RunResumed)] == [2]
    whole = splitft.train(file, tmp_path / "whole")
    assert adapter_bytes(out) == adapter_bytes(whole.folder)
    _assert_same_summary(splitft.Run(out).summary, whole.summary)


def _assert_same_summary(one, other):
    timed = ("wall_seconds", "seconds_by_leg")
    assert {k: v for k, v in one.items() if k not in timed} == {
        k: v for k, v in other.items() if k not in timed
    }


KEPT = {"training": {"optimizer_state": "keep"}, "aggregate": {"rule": "zero-pad"}}
VARIANTS = {
    "default": {},
    "moments kept": KEPT,
    "moments kept, equal ranks": {**KEPT, "lora": {"rank_at_cut": None}, "aggregate": {"rule": "factors"}},
    "magnitudes, moments kept": {**KEPT, "lora": {"method": "dora"}},
    "participation": {"training": {"participation": 0.5}},
    "participation, moments kept": {**KEPT, "training": {"optimizer_state": "keep", "participation": 0.5}},
    "labels on the server": {"split": {"labels": "server"}},
    "shared": {"split": {"server_adapters": "shared"}},
    "shared, moments kept": {**KEPT, "split": {"server_adapters": "shared"}},
    "changes of adapters in int8, with feedback": {
        "wire": {"adapter": "int8"},
        "aggregate": {"rule": "zero-pad"},
    },
    "changes of adapters in bf16": {"wire": {"adapter": "bf16", "in_process": "direct"}},
    "direct": {"wire": {"in_process": "direct"}},
    "updates above the median scaled down": {"aggregate": {"norm_bound": 1.0}},
    "codecs that owe": {"wire": {"hidden": "int2", "gradient": "topk"}},
    "codecs that compare epochs": {"wire": {"hidden": "temporal", "gradient": "int4"}},
    "codecs that learn axes": {"wire": {"hidden": "principal", "gradient": "int8"}},
    "bfloat16, sgd": {"model": {"dtype": "bfloat16"}, "training": {"optimizer": "sgd", "lr": 0.1}},
}


@pytest.mark.parametrize("sections", VARIANTS.values(), ids=VARIANTS)
def test_every_way_of_training_resumes_bit_for_bit(tmp_path, config, sections):
    once = config(**sections)
    whole = splitft.train(once, tmp_path / "whole")
    bounded = [one for one in read_events(whole.folder / "events.jsonl") if isinstance(one, UpdatesBounded)]
    assert [one.round for one in bounded] == ([1, 2, 3] if "norm_bound" in str(sections) else [])
    with pytest.raises(StoppedError):
        splitft.train(once, tmp_path / "stopped", listeners=[stop_at(StepDone, round=2, count=2)])
    again = splitft.train(once, tmp_path / "stopped", resume=True)
    assert adapter_bytes(again.folder) == adapter_bytes(whole.folder)
    _assert_same_summary(again.summary, whole.summary)


@pytest.mark.parametrize(
    ("controller", "stopped_in"), [("makespan", 2), ("makespan", 4), ("resources", 3), ("paper", 3)]
)
def test_cuts_that_move_resume_bit_for_bit_with_the_moments_of_their_blocks(
    tmp_path, config, controller, stopped_in
):
    changes = [
        {"round": 2, "client": 1, "compute": 0.1, "link": 0.05},
        {"round": 2, "client": 2, "compute": 20},
    ]
    once = config(
        training={"rounds": 4, "optimizer_state": "keep"},
        aggregate={"rule": "zero-pad"},
        schedule={"controller": controller, "changes": changes},
    )
    whole = splitft.train(once, tmp_path / "whole")
    assert any(len(set(client["cut"])) > 1 for client in whole.summary["clients"])
    with pytest.raises(StoppedError):
        splitft.train(once, tmp_path / "stopped", listeners=[stop_at(StepDone, stopped_in)])
    again = splitft.train(once, tmp_path / "stopped", resume=True)
    assert adapter_bytes(again.folder) == adapter_bytes(whole.folder)
    _assert_same_summary(again.summary, whole.summary)


@pytest.mark.parametrize(
    "moment",
    [
        stop_at(Evaluated, round=0),
        stop_at(StepDone, round=1, count=4),
        stop_at(RoundDone, round=2),
        stop_at(Evaluated, round=3),
    ],
    ids=["before the first round", "in the first", "after aggregation", "before the last is saved"],
)
@pytest.mark.fault("a run stops at any moment ({id})", "--resume ends with the same bytes")
def test_a_run_may_stop_at_any_moment(tmp_path, config, moment):
    whole = splitft.train(config(), tmp_path / "whole")
    with pytest.raises(StoppedError):
        splitft.train(config(), tmp_path / "stopped", listeners=[moment])
    again = splitft.train(config(), tmp_path / "stopped", resume=True)
    assert adapter_bytes(again.folder) == adapter_bytes(whole.folder)
    _assert_same_summary(again.summary, whole.summary)


@pytest.mark.fault("a stop between the last checkpoint and the adapter", "--resume writes the adapter")
def test_a_stop_between_the_last_checkpoint_and_the_adapter_loses_nothing(tmp_path, config, monkeypatch):
    whole = splitft.train(config(), tmp_path / "whole")
    written = run_folder.write_peft

    def stop_in_round_3(state, *rest):
        if (tmp_path / "stopped/checkpoints/round-0003").exists():
            raise StoppedError
        return written(state, *rest)

    monkeypatch.setattr(run_folder, "write_peft", stop_in_round_3)
    with pytest.raises(StoppedError):
        splitft.train(config(), tmp_path / "stopped")
    monkeypatch.undo()
    assert adapter_bytes(tmp_path / "stopped") != adapter_bytes(whole.folder)
    again = splitft.train(config(), tmp_path / "stopped", resume=True)
    assert adapter_bytes(again.folder) == adapter_bytes(whole.folder)
    assert again.summary["finished"]


def test_a_finished_run_may_be_asked_for_more_rounds(tmp_path, config):
    longer = splitft.train(config(training={"rounds": 4}), tmp_path / "longer")
    splitft.train(config(), tmp_path / "run")
    more = splitft.train(config(training={"rounds": 4}), tmp_path / "run", resume=True)
    assert adapter_bytes(more.folder) == adapter_bytes(longer.folder)
    assert more.summary["rounds"] == 4
    assert more.config.training.rounds == 4


def test_resuming_a_finished_run_changes_nothing(tmp_path, config):
    run = splitft.train(config(), tmp_path / "run")
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    again = splitft.train(config(), tmp_path / "run", resume=True)
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before
    assert again.summary == run.summary


def test_another_configuration_is_refused_by_the_keys_that_differ(tmp_path, config):
    once = config(training={"rounds": 1})
    splitft.train(once, tmp_path / "run")
    other = once.model_copy(update={
        "seed": 7,
        "lora": once.lora.model_copy(update={"rank": 8}),
    })  # fmt: skip
    with pytest.raises(
        RunError, match=r"lora.rank \(was 4, now 8\), seed \(was 0, now 7\); give another --out"
    ):
        splitft.train(other, tmp_path / "run", resume=True)
    assert splitft.Run(tmp_path / "run").config == once


def test_there_must_be_a_run_to_resume(tmp_path, config):
    for folder in (tmp_path / "nothing", tmp_path):
        with pytest.raises(RunError, match="leave --resume out to start one"):
            splitft.train(config(), folder, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_a_run_stopped_in_the_middle_of_divided_steps_ends_bit_for_bit(config, tmp_path):
    divided = config(training={"rounds": 2, "steps": 4, "batch_size": 4, "micro_batches": 3})
    with pytest.raises(StoppedError):
        splitft.train(divided, tmp_path / "stopped", listeners=[stop_at(StepDone, round=2, count=4)])
    resumed = splitft.train(divided, tmp_path / "stopped", resume=True)
    whole = splitft.train(divided, tmp_path / "whole")
    assert adapter_bytes(resumed.folder) == adapter_bytes(whole.folder)
