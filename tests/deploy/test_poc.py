"""A run over FLARE, with a process for every party and certificates, equals its simulation."""

from __future__ import annotations

import contextlib
import json
import tempfile

import psutil
import pytest
from safetensors.torch import load_file

import splitft
from laws.federations import largest_relative_difference
from runs import settings_file
from splitft.config import load
from splitft.deploy.flare.poc import run_poc
from splitft.tracking.log import read_events

pytest.importorskip("nvflare")
EXACT = {"hidden": "fp32", "gradient": "fp32", "adapter": "fp32"}


@pytest.fixture(scope="module")
def both(tmp_path_factory, tiny_llama):
    """The same configuration, simulated and deployed."""
    folder = tmp_path_factory.mktemp("poc")
    config = load(settings_file(folder, tiny_llama, training={"rounds": 2}, wire=EXACT), [])
    simulated = splitft.train(config, folder / "simulated")
    (folder / "scratch").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder / "scratch"))
        deployed = run_poc(config, folder / "deployed")
    return simulated, deployed


def lines_with(text: str) -> list[str]:
    """Command lines of this machine's processes that have a text in them."""
    lines = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            lines.append(" ".join(process.cmdline()))
    return [line for line in lines if text in line]


def factors(run) -> dict:
    return load_file(run.adapter_dir / "adapter_model.safetensors")


def test_deployment_equals_simulation(both):
    simulated, deployed = both
    assert largest_relative_difference(factors(deployed), factors(simulated)) < 1e-5
    assert deployed.summary["eval_loss"] == pytest.approx(simulated.summary["eval_loss"], rel=1e-6)


def test_its_run_folder_is_that_of_a_simulation(both):
    simulated, deployed = both
    files = {path.name for path in simulated.folder.iterdir()}
    assert {path.name for path in deployed.folder.iterdir()} == files | {"logs"}
    for key in ("method", "seed", "model", "rounds", "steps", "tokens", "finished", "labels"):
        assert deployed.summary[key] == simulated.summary[key], key
    for ours, theirs in zip(deployed.summary["clients"], simulated.summary["clients"], strict=True):
        for key in ("name", "cut", "examples", "tokens", "train_examples"):
            assert ours[key] == theirs[key]
    assert deployed.config.training == simulated.config.training


def test_hidden_states_take_as_many_bytes_as_in_simulation(both):
    simulated, deployed = (json.loads(json.dumps(run.summary["bytes"])) for run in both)
    for way in ("up", "down"):
        assert deployed["hidden"][way] == pytest.approx(simulated["hidden"][way], rel=0.01)
        assert deployed["gradient"][way] == pytest.approx(simulated["gradient"][way], rel=0.01)


def test_it_leaves_no_process_and_says_how_its_links_began_and_ended(both):
    _, deployed = both
    events = read_events(deployed.folder / "events.jsonl")
    assert [e.sites for e in events if e.event == "LinkStarted"] == [("client-1", "client-2", "client-3")]
    assert [e.reason for e in events if e.event == "LinkEnded"] == ["finished"]
    scratch = deployed.folder.parent / "scratch"
    assert not list(scratch.iterdir())
    assert not lines_with(str(scratch))
