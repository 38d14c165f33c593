"""The real model over FLARE, a process for every party, learns what it learns in simulation.

A minute or two on two cores, and 3 GB of memory: it runs only where SPLITFT_SLOW=1 asks for it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

import splitft
from laws.federations import largest_relative_difference
from splitft.config import from_mapping, load
from splitft.deploy.flare.poc import run_poc
from splitft.tracking.log import read_events

pytest.importorskip("nvflare")
pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("SPLITFT_SLOW"), reason="minutes long; SPLITFT_SLOW=1 runs it"),
]
CONFIG = {
    "model": {"name": "smollm2-135m", "dtype": "float32"},
    "data": {"source": "python-docs", "max_tokens": 48, "max_examples": 120, "eval_examples": 2},
    "clients": {"count": 3, "cuts": [2, 10, 20], "shares": {"by": "length", "alpha": 1.0}},
    "lora": {"rank": 8, "rank_at_cut": 4},
    "split": {"group_tokens": 1},  # so that rounding does not depend on who came when
    "training": {"rounds": 2, "steps": 2, "batch_size": 2},
    "wire": {"hidden": "fp32", "gradient": "fp32", "adapter": "fp32"},
}

FAST = Path(__file__).resolve().parents[2] / "examples/fast.yaml"


def test_the_fast_example_is_deployed_as_it_is(tmp_path, monkeypatch):
    """One copy of the server's adapters for all, which steps site by site, and int8 on the wire."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    config = load(FAST, [])
    assert config.split.server_adapters == "shared-in-turn"
    run = run_poc(config, tmp_path / "deployed")
    assert run.summary["finished"]
    before, after = run.summary["eval_loss"]
    assert after < before
    events = read_events(run.folder / "events.jsonl")
    assert not [event for event in events if event.event == "SiteChanged"]
    steps = [(event.client, event.step) for event in events if event.event == "StepDone"]
    names = [f"client-{number}" for number in range(1, config.clients.count + 1)]
    assert sorted(steps) == [(name, step) for name in names for step in range(config.training.steps)]


def test_deployment_of_the_real_model_equals_its_simulation(tmp_path, monkeypatch):
    config = from_mapping(CONFIG)
    simulated = splitft.train(config, tmp_path / "simulated")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    deployed = run_poc(config, tmp_path / "deployed")
    ours, theirs = (load_file(run.adapter_dir / "adapter_model.safetensors") for run in (deployed, simulated))
    assert largest_relative_difference(ours, theirs) < 1e-5
    assert deployed.summary["eval_loss"] == pytest.approx(simulated.summary["eval_loss"], rel=1e-5)
