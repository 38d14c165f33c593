"""Checkpoints: whole or not there, the last ones kept, and a full disk costs no round that was finished."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as settings_of
from hypothesis import strategies as st

import splitft
from damage import mutations
from laws.federations import write_text
from runs import StoppedError, adapter_bytes, settings, stop_at
from splitft.adapters import AdapterState, Factors
from splitft.config import from_mapping
from splitft.errors import DamagedError, RunError
from splitft.seals import BLANK, seal
from splitft.tracking.events import RunResumed, StepDone, Warned
from splitft.tracking.log import read_events
from splitft.training import RunState, checkpoint
from splitft.training.checkpoint import (
    Snapshot,
    folder_of,
    latest,
    load_latest,
    load_snapshot,
    save_snapshot,
)


def _snapshot(number: int, width: int = 8) -> Snapshot:
    generator = torch.Generator().manual_seed(number)
    factors = Factors(torch.randn(2, width, generator=generator), torch.randn(3, 2, generator=generator))
    state = RunState(number, {"a": 1, "b/c": 2}, AdapterState({(0, "self_attn.q_proj"): factors}), {"a": 0.1})

    def moments() -> dict[str, torch.Tensor]:
        name = "0.self_attn.q_proj.A"
        return {f"{name}.exp_avg": factors.A + 1, f"{name}.step": torch.tensor(4.0)}

    return Snapshot(state, {"a": 7, "b/c": 3}, {"b/c": moments()}, {"a": moments(), "=shared": moments()})


def _assert_same(found: Snapshot, wanted: Snapshot) -> None:
    assert (found.state.round, found.state.cuts, found.steps, found.state.losses) == (
        (wanted.state.round, wanted.state.cuts, wanted.steps, wanted.state.losses)
    )
    for one, other in [
        (found.state.adapters.tensors(), wanted.state.adapters.tensors()),
        *((found.client_moments[name], wanted.client_moments[name]) for name in wanted.client_moments),
        *((found.server_moments[name], wanted.server_moments[name]) for name in wanted.server_moments),
    ]:
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_snapshot_is_read_as_it_was_written(tmp_path):
    assert save_snapshot(tmp_path, _snapshot(3)) == folder_of(tmp_path, 3)
    found = load_snapshot(tmp_path, 3)
    _assert_same(found, _snapshot(3))
    assert (found.client_moments.keys(), found.server_moments.keys()) == ({"b/c"}, {"a", "=shared"})


def test_the_last_two_are_kept_in_the_order_of_rounds(tmp_path):
    assert latest(tmp_path) is None
    for number in (9, 10, 9_999, 10_000):
        save_snapshot(tmp_path, _snapshot(number))
    assert latest(tmp_path) == 10_000
    held = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert held == {"round-9999", "round-10000"}


def test_what_is_not_a_whole_checkpoint_is_ignored(tmp_path):
    save_snapshot(tmp_path, _snapshot(1))
    (tmp_path / "checkpoints/.round-0002.draft").mkdir()
    (tmp_path / "checkpoints/.round-0002.draft/state.safetensors").write_bytes(b"torn")
    (tmp_path / "checkpoints/round-0003.copy").mkdir()
    (tmp_path / "checkpoints/round-0004").write_text("a file")
    assert latest(tmp_path) == 1
    save_snapshot(tmp_path, _snapshot(2))  # over the draft
    _assert_same(load_snapshot(tmp_path, 2), _snapshot(2))


@pytest.mark.parametrize("step", ["_save", "_flush", "os.replace"])
def test_a_disk_that_fills_up_at_any_step_leaves_the_checkpoint_before(tmp_path, monkeypatch, step):
    save_snapshot(tmp_path, _snapshot(1))

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"{checkpoint.__name__}.{step}", full)
    with pytest.raises(RunError) as caught:
        save_snapshot(tmp_path, _snapshot(2))
    monkeypatch.undo()
    assert "the checkpoint of round 2 could not be written" in str(caught.value)
    assert "No space left on device" in str(caught.value)
    assert f"round 1 is safe in {folder_of(tmp_path, 1)}" in str(caught.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["round-0001"]
    _assert_same(load_snapshot(tmp_path, latest(tmp_path)), _snapshot(1))


def test_a_first_round_that_cannot_be_written_says_that_none_is_saved(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(RunError, match="no round is saved yet"):
        save_snapshot(tmp_path, _snapshot(1))


LIMITED = """
    import resource, sys
    from pathlib import Path
    sys.path[:0] = {path!r}
    from training.test_checkpoint import _snapshot
    from splitft.errors import RunError
    from splitft.training.checkpoint import save_snapshot
    run = Path({run!r})
    save_snapshot(run, _snapshot(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        save_snapshot(run, _snapshot(2, width=100_000))
    except RunError as error:
        print(error)
"""


@pytest.mark.fault("the disk is full as a checkpoint is written", "the checkpoint before it stays")
def test_a_real_limit_on_file_size_leaves_the_checkpoint_before(tmp_path):
    tests = os.path.dirname(os.path.dirname(__file__))
    code = textwrap.dedent(LIMITED).format(path=[tests], run=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the checkpoint of round 2 could not be written" in done.stdout
    assert "File too large" in done.stdout
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["round-0001"]
    _assert_same(load_snapshot(tmp_path, 1), _snapshot(1))


def _spoil_state(folder: Path, text: str) -> None:
    (folder / "state.json").write_text(text)


DAMAGES = {
    "torn tensors": lambda folder: os.truncate(folder / "state.safetensors", 100),
    "no tensors": lambda folder: (folder / "state.safetensors").unlink(),
    "empty tensors": lambda folder: os.truncate(folder / "state.safetensors", 0),
    "torn facts": lambda folder: os.truncate(folder / "state.json", 10),
    "facts of nothing": lambda folder: _spoil_state(folder, "{}"),
    "facts in a list": lambda folder: _spoil_state(folder, "[1]"),
    "not text": lambda folder: (folder / "state.json").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.fault("the last checkpoint is damaged: {id}", "the one before is taken, and it is said")
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, damage):
    for number in (1, 2):
        save_snapshot(tmp_path, _snapshot(number))
    damage(folder_of(tmp_path, 2))
    with pytest.raises(DamagedError, match="round-0002 is damaged and cannot be used"):
        load_snapshot(tmp_path, 2)
    found = load_latest(tmp_path)
    _assert_same(found, _snapshot(1))
    assert len(found.passed_over) == 1
    assert "round-0002 is damaged" in found.passed_over[0]
    assert "goes on from round 1 instead" in found.passed_over[0]
    damage(folder_of(tmp_path, 1))
    with pytest.raises(
        RunError, match=r"round-0002 is damaged .*round-0001 is damaged .*start again with another --out"
    ):
        load_latest(tmp_path)


def test_a_checkpoint_in_the_place_of_another_is_damage(tmp_path):
    for number in (1, 2):
        save_snapshot(tmp_path, _snapshot(number))
    for file in ("state.json", "state.safetensors"):
        (folder_of(tmp_path, 2) / file).write_bytes((folder_of(tmp_path, 1) / file).read_bytes())
    with pytest.raises(DamagedError, match="it holds round 1"):
        load_snapshot(tmp_path, 2)


def test_tensors_of_another_round_are_damage(tmp_path):
    for number in (1, 2):
        save_snapshot(tmp_path, _snapshot(number))
    one, two = (folder_of(tmp_path, number) / "state.safetensors" for number in (1, 2))
    two.write_bytes(one.read_bytes())
    assert load_latest(tmp_path).state.round == 1


@given(data=st.data(), file=st.sampled_from(["state.json", "state.safetensors"]))
@settings_of(max_examples=400, deadline=None)
@pytest.mark.fault("any byte of any file of a checkpoint is changed", "found every time")
def test_any_change_of_any_file_is_found(two_rounds, data, file):
    path = folder_of(two_rounds, 2) / file
    written = path.read_bytes()
    mutated = data.draw(mutations(written))
    path.write_bytes(mutated)
    try:
        found = load_latest(two_rounds)
        assert found.state.round == 1, f"{mutated!r:.300}"
        assert "round-0002 is damaged" in found.passed_over[0]
    finally:
        path.write_bytes(written)
    assert load_latest(two_rounds).state.round == 2


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory):
    run = tmp_path_factory.mktemp("two-rounds")
    for number in (1, 2):
        save_snapshot(run, _snapshot(number))
    return run


def test_every_single_byte_of_the_facts_counts(two_rounds):
    path = folder_of(two_rounds, 2) / "state.json"
    written = path.read_bytes()
    try:
        for place in range(len(written)):
            for other in {written[place] ^ 1, ord("1"), ord(" "), ord("0")} - {written[place]}:
                path.write_bytes(written[:place] + bytes([other]) + written[place + 1 :])
                with pytest.raises(DamagedError):
                    load_snapshot(two_rounds, 2)
    finally:
        path.write_bytes(written)


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    """Its seal is right, so it is no damage, and an older one must not be taken in silence."""
    for number in (1, 2):
        folder = save_snapshot(tmp_path, _snapshot(number))
    text = (folder / "state.json").read_text().replace('"format": 2', '"format": 99')
    (folder / "state.json").write_bytes(seal(re.sub("sha256:[0-9a-f]{64}", BLANK, text).encode()))
    for read in (load_latest, lambda run: load_snapshot(run, 2)):
        with pytest.raises(RunError, match="has format 99, this version reads 1 and 2"):
            read(tmp_path)


@pytest.fixture
def config(tiny_llama, tmp_path):
    return from_mapping(settings(tiny_llama, write_text(tmp_path / "notes.jsonl")))


@pytest.mark.fault("the disk fills up as a run trains", "finished rounds are kept; --resume goes on")
def test_a_run_on_a_disk_that_fills_up_keeps_its_rounds_and_resumes(tmp_path, config, monkeypatch):
    whole = splitft.train(config, tmp_path / "whole")
    written = checkpoint._save

    def full_in_round_2(data, path):
        if "round-0002" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written(data, path)

    monkeypatch.setattr(checkpoint, "_save", full_in_round_2)
    with pytest.raises(RunError, match=r"No space left on device.*round 1 is safe.*continue with --resume"):
        splitft.train(config, tmp_path / "run")
    monkeypatch.undo()
    assert splitft.Run(tmp_path / "run").summary["rounds"] == 1
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
    again = splitft.train(config, tmp_path / "run", resume=True)
    assert adapter_bytes(again.folder) == adapter_bytes(whole.folder)


@pytest.fixture(scope="module")
def stopped(tiny_llama, tmp_path_factory):
    """A run that has checkpoints of rounds 2 and 3 of 4, and what it learns if it goes on from round 2."""
    folder = tmp_path_factory.mktemp("stopped")
    text = write_text(folder / "notes.jsonl")
    training = {"rounds": 4, "optimizer_state": "keep"}
    config = from_mapping(settings(tiny_llama, text, training=training, aggregate={"rule": "zero-pad"}))
    with pytest.raises(StoppedError):
        splitft.train(config, folder / "run", listeners=[stop_at(StepDone, round=4)])
    shutil.copytree(folder / "run", folder / "older")
    shutil.rmtree(folder_of(folder / "older", 3))
    return config, folder / "run", adapter_bytes(splitft.train(config, folder / "older", resume=True).folder)


@given(data=st.data(), file=st.sampled_from(["state.json", "state.safetensors"]))
@settings_of(
    max_examples=3,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # each example is a run
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_a_run_with_a_harmed_checkpoint_goes_on_from_the_one_before(
    stopped, tmp_path_factory, caplog, data, file
):
    config, stopped_run, wanted = stopped
    run = shutil.copytree(stopped_run, tmp_path_factory.mktemp("harmed") / "run")
    path = folder_of(run, 3) / file
    path.write_bytes(data.draw(mutations(path.read_bytes())))
    caplog.clear()
    again = splitft.train(config, run, resume=True)
    assert adapter_bytes(again.folder) == wanted
    events = read_events(run / "events.jsonl")
    assert [event.round for event in events if isinstance(event, RunResumed)] == [3]
    warnings = [event.message for event in events if isinstance(event, Warned)]
    assert any("round-0003 is damaged" in message for message in warnings)
    assert "round-0003 is damaged" in caplog.text
    held = {path.name for path in (run / "checkpoints").iterdir()}
    assert held == {"round-0003", "round-0004", "round-0003.damaged"}


def test_a_run_without_a_whole_checkpoint_is_refused_and_left_as_it_is(stopped, tmp_path):
    run = shutil.copytree(stopped[1], tmp_path / "run")
    for number in (2, 3):
        os.truncate(folder_of(run, number) / "state.safetensors", 50)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match="no checkpoint is left: start again with another --out"):
        splitft.train(stopped[0], run, resume=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_others_may_read_what_a_run_writes(tmp_path, config):
    """A fault once seen: files that only their owner could read."""
    run = splitft.train(config, tmp_path / "run")
    files = [*run.adapter_dir.iterdir(), *(tmp_path / "run/checkpoints").glob("*/*")]
    assert len(files) > 4
    assert [file for file in files if not file.stat().st_mode & 0o040] == []
