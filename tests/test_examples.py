"""Every file in examples/ runs as it is."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

import splitft
from splitft.cli.train import DEMO
from splitft.config import from_mapping, load

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").iterdir())
QUICK = {"quickstart.yaml": ["training.rounds=1", "training.steps=2"]}
"""Overrides for those that take minutes."""

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.mark.parametrize("file", [e for e in EXAMPLES if e.suffix == ".yaml"], ids=lambda file: file.name)
def test_a_configuration_trains_and_its_held_out_loss_falls(file, tmp_path, monkeypatch, real_model):
    monkeypatch.chdir(ROOT)
    run = splitft.train(file, tmp_path / "run", overrides=QUICK.get(file.name, []))
    losses = run.summary["eval_loss"]
    assert losses[-1] < losses[0]
    assert run.summary["finished"]
    assert run.adapter_dir.is_dir()


@pytest.mark.parametrize("file", [e for e in EXAMPLES if e.suffix == ".py"], ids=lambda file: file.name)
def test_a_program_runs(file, tmp_path, monkeypatch, capsys, real_model):
    monkeypatch.setattr(sys, "argv", [str(file), str(tmp_path / "run")])
    runpy.run_path(str(file), run_name="__main__")
    assert "peft loaded" in capsys.readouterr().out


def test_the_quickstart_is_the_demo():
    assert load(ROOT / "examples/quickstart.yaml") == from_mapping(DEMO)
