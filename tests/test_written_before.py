"""What an earlier version wrote is still read: run folders, checkpoints, frames and configurations.

`written_before/` was made by version 0.1.0 of 2026-11-28 (commit f50a0ae) and is never made again: a tiny
llama, three runs stopped in their last round with what each would have ended with (`finished.*`), one frame
of every kind, and the configurations of that day.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import splitft
from protocol.test_messages import EXACT, SAMPLES, _assert_same
from splitft.config import load
from splitft.protocol.frame import open_frame
from splitft.tracking.log import read_events

BEFORE = Path(__file__).parent / "written_before"
RUNS = ("moments_and_codec_memory", "private_blocks_and_folded_base", "own_factors")
FRAMES = sorted((BEFORE / "frames").iterdir())
CONFIGURATIONS = sorted((BEFORE / "configurations").iterdir())


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_stopped_then_is_finished_now(tmp_path, monkeypatch, name):
    shutil.copytree(BEFORE, tmp_path / "before")
    monkeypatch.chdir(tmp_path / "before")
    run = splitft.train(Path(name) / "config.yaml", Path(name), resume=True)
    wanted = load_file(Path(name) / "finished.safetensors")
    found = load_file(run.adapter_dir / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():  # rounding decides the sign of a row of A and its column of B
        torch.testing.assert_close(found[key].abs(), tensor.abs(), rtol=1e-3, atol=1e-4)
    for key in (key for key in wanted if "lora_A" in key):
        there, here = (held[key.replace("lora_A", "lora_B")] @ held[key] for held in (wanted, found))
        torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-5)
    losses = json.loads((Path(name) / "finished.json").read_text(encoding="utf-8"))
    assert run.summary["eval_loss"] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_its_folder_is_read_and_reported(tmp_path, name):
    folder = shutil.copytree(BEFORE / name, tmp_path / name)
    events = list(read_events(folder / "events.jsonl"))
    assert len(events) == sum(1 for line in (folder / "events.jsonl").open(encoding="utf-8") if line.strip())
    run = splitft.Run(folder)
    assert run.config.clients.count == 3
    assert "</html>" in run.report().read_text(encoding="utf-8")


@pytest.mark.parametrize("file", FRAMES, ids=lambda file: file.stem)
def test_a_frame_is_read_and_written_as_it_was(file):
    data = file.read_bytes()
    assert file.stem.partition("-")[2] == open_frame(data).kind
    message = EXACT.from_bytes(data)
    assert EXACT.to_bytes(message) == data
    number = int(file.stem.partition("-")[0])
    if number < len(SAMPLES):
        _assert_same(message, SAMPLES[number])


@pytest.mark.parametrize("file", CONFIGURATIONS, ids=lambda file: file.stem)
def test_a_configuration_is_read(file):
    load(file)
