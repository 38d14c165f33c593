"""`splitft deploy site FILE --check` opens what a session would open, and says what it found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from laws.federations import write_text
from runs import invoke, settings
from splitft.cache import file_digest


@pytest.fixture
def place(tmp_path, tiny_llama, monkeypatch):
    """A folder with a run of two sites, and a way to write the data owner's file."""
    monkeypatch.setenv("COLUMNS", "400")
    text = write_text(tmp_path / "notes.jsonl")
    run = settings(
        tiny_llama,
        Path("python-docs"),
        clients={"count": 2, "cuts": [1, 3]},
        deploy={"sites": ["north", "south"]},
    )
    run["data"]["max_examples"] = 40
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")

    def check(*arguments, **sections):
        own = {"text": {"source": str(text)}, **sections}
        (tmp_path / "site.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
        return invoke("deploy", "site", tmp_path / "site.yaml", "--check", *arguments)

    check.run = ("--run", tmp_path / "run.yaml")
    check.text = text
    return check


def lines(done, subject):
    return [" ".join(line.split()) for line in done.stdout.splitlines() if f" {subject} " in f" {line} "]


def test_a_file_that_fits_is_told_all_that_a_run_would_use(place, tiny_llama):
    done = place(*place.run, "--name", "south", machine={"memory_gb": 4})
    assert done.exit_code == 0, done.output
    assert "would take part" in done.stdout
    assert lines(done, "cut")[0].startswith("ok cut 3 of 4 blocks (clients.cuts)")
    assert lines(done, "type")[0].startswith("ok type float32 (")
    assert "36 examples to train on, 4 to evaluate on" in done.stdout
    assert file_digest(tiny_llama / "model.safetensors")[:8] in done.stdout
    assert "tokens; tokenizer.json" in done.stdout
    assert "this site gives 4 GB" in done.stdout
    assert "WARNING" not in done.stdout


def test_the_cut_is_that_of_the_named_site(place):
    assert place(*place.run, "--name", "north", bounds={"min_cut": 2}).exit_code == 2
    assert place(*place.run, "--name", "south", bounds={"min_cut": 2}).exit_code == 0
    unnamed = place(*place.run, bounds={"min_cut": 2})
    assert unnamed.exit_code == 0
    assert "give --name, one of north, south" in unnamed.stdout
    stranger = place(*place.run, "--name", "west")
    assert stranger.exit_code == 2
    assert "north, south" in stranger.stderr


def test_embedded_text_in_place_of_the_sites_own_is_said_loudly(place):
    for arguments in ((), (*place.run, "--name", "north")):
        done = place(*arguments, text={"source": None})
        assert done.exit_code == 0, done.output
        assert "WARNING" in done.stdout
        assert "the text of this site is NOT read" in done.stdout


def test_every_reason_to_decline_is_told_at_once(place, tiny_llama):
    done = place(
        *place.run, "--name", "north",
        bounds={"min_cut": 2}, machine={"memory_gb": 1e-6}, limits={"steps": 1},
        model={"trusted": {"model.safetensors": "ab" * 32}}, allows={"hidden": ["int8"]},
    )  # fmt: skip
    assert done.exit_code == 2
    for key in ("bounds.min_cut", "machine.memory_gb", "limits.steps", "model.trusted", "allows.hidden"):
        assert key in done.stderr
    assert file_digest(tiny_llama / "model.safetensors") in done.stderr  # to be compared, and copied
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda place: place.text.unlink(), "there is no file"),
        (lambda place: place.text.write_text('{"txt": "a"}\n', encoding="utf-8"), "has no column 'text'"),
        (lambda place: place.text.write_text("not JSON\n", encoding="utf-8"), "is not JSON"),
        (
            lambda place: place.text.write_text('{"text": "one row"}\n', encoding="utf-8"),
            "need at least 2 examples",
        ),
    ],
)
def test_text_that_cannot_be_used_is_found_before_the_session(place, change, found):
    change(place)
    done = place(*place.run, "--name", "north")
    assert done.exit_code == 2
    assert found in done.stderr
    assert "tokenizer.json" in done.stdout  # the rest is looked at nevertheless


def test_a_model_that_cannot_be_read_is_found(place, tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "own")
    (folder / "model.safetensors").write_bytes(b"nothing")
    done = place(*place.run, "--name", "north", model={"folder": str(folder)})
    assert done.exit_code == 2
    assert "model.safetensors" in done.stderr


def test_a_file_is_checked_without_a_run_too(place, tiny_llama):
    done = place(model={"folder": str(tiny_llama)})
    assert done.exit_code == 0, done.output
    assert "40 rows" in done.stdout
    assert lines(done, "tokens")[0].endswith("in 40 examples")
    place.text.write_text(json.dumps({"text": "a\x1b[2J"}) + "\n", encoding="utf-8")
    assert "1 row" in place(model={"folder": str(tiny_llama)}).stdout


def test_a_relative_path_is_noted(place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    done = place(text={"source": "notes.jsonl"})
    assert done.exit_code == 0
    assert "the path is relative" in done.stdout
