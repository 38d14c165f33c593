"""A run goes on only with the model, the tokenizer and the text that it began with, wherever they lie now."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file

import splitft
from laws.federations import write_text
from runs import StoppedError, adapter_bytes, settings, stop_at
from splitft.config import from_mapping
from splitft.errors import RunError
from splitft.model import open_model
from splitft.model.identity import tokenizer_digest, weight_digests
from splitft.model.weights import digests
from splitft.model.weights.digests import kept_digest
from splitft.run.same_inputs import check_inputs
from splitft.specs import ModelSpec
from splitft.tracking.events import StepDone
from splitft.tracking.log import read_started


@pytest.fixture(scope="module")
def stopped(tiny_llama, tmp_path_factory):
    """A folder with a model, a text and a run that stopped in its second round; and what it should learn."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(tiny_llama, folder / "model")
    write_text(folder / "notes.jsonl")
    config = _config(folder)
    wanted = adapter_bytes(splitft.train(config, folder / "whole").folder)
    with pytest.raises(StoppedError):
        splitft.train(config, folder / "run", listeners=[stop_at(StepDone, round=2)])
    return folder, wanted


def _config(folder):
    return from_mapping(
        settings(folder / "model", folder / "notes.jsonl", training={"rounds": 2, "steps": 2})
    )


@pytest.fixture
def moved(stopped, tmp_path):
    """The same elsewhere."""
    return shutil.copytree(stopped[0], tmp_path / "elsewhere")


def _append(folder):
    with (folder / "notes.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more sentence that nobody had seen before"}) + "\n")


def _replace_one(folder):
    lines = (folder / "notes.jsonl").read_text().splitlines(keepends=True)
    lines[3] = json.dumps({"text": "another sentence in the place of one"}) + "\n"
    (folder / "notes.jsonl").write_text("".join(lines))


def _change_a_weight(folder):
    path = folder / "model/model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.3.mlp.down_proj.weight"][0, 0] += 1e-3
    save_file(tensors, path, {"format": "pt"})


def _change_a_setting(folder):
    path = folder / "model/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-2}))


def _change_the_tokenizer(folder):
    path = folder / "model/tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(content))


CHANGES = {
    "a text that grew": (_append, "examples to train on and"),
    "a text of equal length": (_replace_one, "has as many examples as before, but others"),
    "a weight": (_change_a_weight, "model.safetensors of the base model has SHA-256"),
    "a setting": (_change_a_setting, "config.json of the base model has SHA-256"),
    "the tokenizer": (_change_the_tokenizer, "the tokenizer is another"),
}


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_changed_inputs_are_refused_and_the_run_is_left_as_it_is(moved, change, words):
    change(moved)
    before = {path: path.read_bytes() for path in (moved / "run").rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=words) as caught:
        splitft.train(_config(moved), moved / "run", resume=True)
    assert "another --out" in str(caught.value)
    assert {path: path.read_bytes() for path in (moved / "run").rglob("*") if path.is_file()} == before


def test_a_run_whose_model_and_text_have_only_moved_goes_on_bit_for_bit(stopped, moved):
    again = splitft.train(_config(moved), moved / "run", resume=True)
    assert adapter_bytes(again.folder) == stopped[1]
    assert again.config.model.name == str(moved / "model")
    assert str(moved) in (again.adapter_dir / "adapter_config.json").read_text()


def test_a_run_of_an_earlier_version_may_not_move(moved):
    path = moved / "run/events.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    started = {key: value for key, value in json.loads(lines[0]).items() if key not in ("base", "tokenizer")}
    path.write_text("".join([json.dumps(started) + "\n", *lines[1:]]))
    with pytest.raises(RunError, match=r"another configuration: model.name"):
        splitft.train(_config(moved), moved / "run", resume=True)


def test_a_file_that_only_one_side_knows_does_not_count_unless_it_has_weights(stopped, tmp_path):
    run, started = stopped[0] / "run", read_started(stopped[0] / "run/events.jsonl")
    check_inputs(run, {**started.base, "tokenizer.json": "1" * 64})
    for base in (
        {**started.base, "more.safetensors": "1" * 64},
        {"config.json": started.base["config.json"]},
    ):
        with pytest.raises(RunError, match=r"the base model is in .*, and was in model.safetensors"):
            check_inputs(run, base)


def test_how_a_run_began_is_read_without_the_rest(stopped, tmp_path):
    run = stopped[0] / "run"
    started = read_started(run / "events.jsonl")
    assert set(started.base) == {"model.safetensors", "config.json"}
    assert all(len(digest) == 64 for digest in (*started.base.values(), started.tokenizer))
    (tmp_path / "events.jsonl").write_text(started.model_dump_json() + "\nnot an event\n")
    assert read_started(tmp_path / "events.jsonl") == started
    assert read_started(tmp_path / "none.jsonl") is None


def test_a_file_is_hashed_once_until_it_is_touched(tmp_path, monkeypatch):
    monkeypatch.setenv("SPLITFT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    first = kept_digest(path)
    monkeypatch.setattr(digests, "_digest", lambda path: pytest.fail("hashed again"))
    assert kept_digest(path) == first
    monkeypatch.undo()
    monkeypatch.setenv("SPLITFT_CACHE", str(tmp_path / "cache"))
    times = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy that keeps times
    assert kept_digest(path) != first


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("SPLITFT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    assert len(kept_digest(path)) == 64


def test_who_wrote_a_configuration_does_not_count(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "transformers_version": "9.9"}, indent=7))
    one, other = (open_model(ModelSpec(name=str(place))) for place in (tiny_llama, folder))
    assert weight_digests(one) == weight_digests(other)
    assert tokenizer_digest(one.tokenizer()) == tokenizer_digest(other.tokenizer())
