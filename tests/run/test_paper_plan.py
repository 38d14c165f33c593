"""`splitft plan` of a model that is not here: its sizes, from config.json alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from laws.federations import write_text
from splitft.cli import app
from splitft.config import from_mapping, load
from splitft.errors import ModelError
from splitft.model import open_model
from splitft.run import border_map
from splitft.run.fleet import exact_sizes
from splitft.run.inputs import ranks_of
from splitft.run.plan import fleet_for, plan
from splitft.schedule.presets import DEVICES
from splitft.specs import ModelSpec

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ROOT / "examples/shapes"
PUBLISHED = {
    "smollm2-135m": 134_515_008, "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248, "qwen3-32b": 32_762_123_264,
}  # fmt: skip
"""Parameters of the published checkpoints."""


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def _config(name: str, **schedule: object):
    return from_mapping({
        "model": {"name": str(SHAPES / name), "dtype": "bfloat16"},
        "data": {"max_tokens": 512},
        "clients": {"count": 2, "cuts": 2},
        "training": {"batch_size": 4, "steps": 10},
        "schedule": schedule,
    })  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_parameters_are_those_of_the_published_model(name):
    model = open_model(ModelSpec(name=str(SHAPES / name), dtype="bfloat16"), weights=False)
    config = _config(name)
    sizes = exact_sizes(model, ranks_of(config, model.shape.blocks, ["client-1"]))
    counted = sizes.embedding_parameters + sizes.head_parameters + sizes.blocks * sizes.block_parameters
    assert counted == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "embedding_and_head", "a_block", "an_adapter"),
    [
        # V D twice, final norm; q, k, v, o, three of the feed-forward layer, norms; (in + out) of q, k, v, o
        ("llama-3.1-8b", 2 * 128256 * 4096 + 4096,
         2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096, 2 * 8192 + 2 * 5120),
        ("qwen3-32b", 2 * 151936 * 5120 + 5120,
         2 * 5120 * 8192 + 2 * 5120 * 1024 + 3 * 5120 * 25600 + 2 * 5120 + 2 * 128, 2 * 13312 + 2 * 6144),
    ],
)  # fmt: skip
def test_the_weights_of_a_client_are_those_counted_by_hand(name, embedding_and_head, a_block, an_adapter):
    from splitft.schedule.memory import client_memory

    fleet = fleet_for(_config(name, devices="laptop"))
    memory = client_memory(fleet.costs, fleet.clients[0], 3)
    assert memory.weights == 2 * (embedding_and_head + 3 * a_block)
    assert memory.adapters == 4 * an_adapter * (16 + 16 + 8)  # the last block before the cut has rank 8


def test_seconds_follow_from_the_operations_of_the_preset():
    fleet = fleet_for(_config("llama-3.1-8b", devices="server-gpu"))
    device, sizes = fleet.clients[0].device, fleet.costs.sizes
    operations = 2 * sizes.block_parameters + 4 * 4096 * 512 / 2
    assert device.block_forward_s_per_token == pytest.approx(operations / (0.3 * 312e12))


def test_bytes_of_a_step_are_those_of_full_batches():
    """Hidden states and gradients of 4 x 512 tokens in bf16, there and back; with labels twice."""
    price = plan(_config("llama-3.1-8b")).clients[0].prices[1]
    hidden = 4 * 512 * 4096 * 2 * 10
    assert price.up_mb * 1e6 == pytest.approx(2 * hidden, rel=0.05)


def test_without_weights_the_plan_is_that_with_weights(tiny_llama, tmp_path):
    here = tmp_path / "here"
    shutil.copytree(tiny_llama, here)
    settings = {
        "model": {"name": str(here), "dtype": "float32"},
        "data": {"source": str(write_text(tmp_path / "notes.jsonl")), "max_tokens": 32},
        "clients": {"count": 3, "cuts": [1, 2, 3]},
    }
    whole = plan(from_mapping(settings))
    for file in here.glob("*.safetensors"):
        file.unlink()
    assert plan(from_mapping({**settings, "seed": 0, "trackers": []})).clients == whole.clients
    assert not whole.assumption


@pytest.mark.parametrize("as_json", [False, True])
def test_the_example_is_planned_and_says_what_it_assumes(as_json):
    command = ["plan", str(SHAPES / "plan.yaml"), *(["--json"] if as_json else [])]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "no tokenizer" in " ".join(result.output.split())
    if as_json:
        data = json.loads(result.output)
        assert data["blocks"] == 32
        assert len(data["clients"]) == 5
    assert load(SHAPES / "plan.yaml").model.name == "examples/shapes/llama-3.1-8b"


def test_the_launch_overhead_of_presets_is_a_multiple_of_their_estimate():
    devices = [
        fleet_for(_config("smollm2-135m", devices="phone", launch_overhead=times)).clients[0].device
        for times in (0.0, 4.0)
    ]
    assert devices[0] == fleet_for(_config("smollm2-135m", devices="phone")).clients[0].device
    assert devices[0].block_overhead_s == 0
    assert devices[1].block_overhead_s == pytest.approx(4 * 81 * 30e-6)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_map_says_which_method_is_quickest_where(as_json, tmp_path, monkeypatch):
    assert border_map.FLEETS["one of each"] == tuple(DEVICES)
    monkeypatch.setattr(border_map, "FLEETS", {"2 x laptop": ("laptop",) * 2})
    file = tmp_path / "run.yaml"
    settings = {
        "model": {"name": str(SHAPES / "smollm2-135m"), "dtype": "bfloat16"},
        "data": {"max_tokens": 64},
        "clients": {"count": 2, "cuts": 2},
    }
    file.write_text(json.dumps(settings), encoding="utf-8")
    result = CliRunner().invoke(app, ["plan", str(file), "--map", *(["--json"] if as_json else [])])
    assert result.exit_code == 0, result.output
    if as_json:
        data = json.loads(result.output)
        assert len(data["places"]) == 4 * 3  # links, steps
        assert data["places"][0]["methods"]["fedlora"]["cuts"] == [30] * 2
        assert data["memory_gb"]["cut 1"] < data["memory_gb"]["whole"]
    else:
        assert "whole: " in result.output
        assert "2 x laptop" in result.output


def test_a_measured_machine_needs_the_weights_and_says_so():
    with pytest.raises(ModelError, match=r"llama-3.1-8b: no model\.safetensors"):
        plan(_config("llama-3.1-8b", devices="measured"))


def test_training_without_weights_is_refused(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"model": {"name": str(SHAPES / "llama-3.1-8b")}}), encoding="utf-8")
    result = CliRunner().invoke(app, ["train", str(file), "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "no model.safetensors" in " ".join(result.output.split())
