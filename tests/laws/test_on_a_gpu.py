"""On a real accelerator: the losses of a run are the CPU's, to the rounding of the device (`make check-gpu`).

Skipped where there is none. `pytest --fake-device -m gpu` runs them on the fake device, to test the tests.
"""

from __future__ import annotations

import pytest
import torch

import splitft
from laws.federations import federation, play, write_text
from laws.test_devices import OPTIONS
from runs import StoppedError, adapter_bytes, settings, stop_at
from splitft.config import from_mapping
from splitft.geometry import Span
from splitft.model import CPU, open_model
from splitft.model.devices import available_devices
from splitft.specs import ModelSpec
from splitft.specs.rules import RULES
from splitft.tracking.events import Evaluated, StepDone

pytestmark = pytest.mark.gpu
SHORT = {"rounds": 2, "steps": 3}
EXACT = dict.fromkeys(("hidden", "gradient", "adapter"), "fp32")
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
"""Of losses, relative."""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


@pytest.fixture
def gpu():
    return str(available_devices()[0])


@pytest.fixture
def losses(tiny_llama, text):
    def run(devices, dtype="float32", **sections):
        plain = {"training": SHORT, "wire": EXACT, "model": {"dtype": dtype}, "devices": devices}
        merged = {name: {**plain.get(name, {}), **sections.get(name, {})} for name in {**plain, **sections}}
        _, events = play(federation(tiny_llama, text, [1, 3], **merged))
        found = [event.loss for event in events if isinstance(event, StepDone | Evaluated)]
        found = [loss for loss in found if loss is not None]
        return torch.tensor(found, dtype=torch.float64)

    return run


def _compare(losses, devices, dtype="float32", **sections):
    wanted = losses({"server": "cpu", "clients": "cpu"}, dtype, **sections)
    torch.testing.assert_close(losses(devices, dtype, **sections), wanted, rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("parties", [("server",), ("clients",), ("server", "clients")], ids="+".join)
def test_losses_are_those_of_the_cpu(parties, dtype, losses, gpu):
    devices = {party: gpu if party in parties else "cpu" for party in ("server", "clients")}
    _compare(losses, devices, dtype)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_runs(rule, losses, gpu):
    ranks = {"rank_at_cut": None if rule == "factors" else 2}
    _compare(losses, {"server": gpu, "clients": gpu}, aggregate={"rule": rule}, lora=ranks)


@pytest.mark.parametrize("sections", OPTIONS.values(), ids=OPTIONS)
def test_every_way_to_train_runs(sections, losses, gpu):
    _compare(losses, {"server": gpu, "clients": gpu}, **sections)


def test_several_devices_divide_the_server_s_blocks(losses):
    several = [str(device) for device in available_devices() if device.type != "cpu"]
    if len(several) < 2:
        pytest.skip("needs two accelerators")
    _compare(losses, {"server": several[:2], "clients": several[0]})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_family_computes_what_it_computes_on_the_cpu(tiny_folders, family, dtype, gpu):
    model = open_model(ModelSpec(name=str(tiny_folders[family]), dtype=dtype))
    tokens = torch.arange(18).view(2, 9) % model.shape.vocab
    logits = []
    for device in (CPU, torch.device(gpu)):
        segment = model.segment(Span(0, 4), embedding=True, head=True, device=device)
        logits.append(segment.logits(segment.run(tokens).flatten(0, 1)).detach().float().cpu())
    scale = float(logits[0].abs().max())
    assert float((logits[1] - logits[0]).abs().max()) < scale * (1e-4 if dtype == "float32" else 3e-2)


def test_a_run_repeats_and_resumes_to_the_last_bit(tiny_llama, text, tmp_path, gpu):
    sections = {
        "devices": {"server": gpu, "clients": gpu},
        "aggregate": {"rule": "factors"},
        "lora": {"rank_at_cut": None},
        "training": {**SHORT, "optimizer_state": "keep"},
    }
    config = from_mapping(settings(tiny_llama, text, **sections))
    whole = splitft.train(config, tmp_path / "whole")
    with pytest.raises(StoppedError):
        splitft.train(config, tmp_path / "stopped", listeners=[stop_at(StepDone, 2, 4)])
    resumed = splitft.train(config, tmp_path / "stopped", resume=True)
    assert adapter_bytes(resumed.folder) == adapter_bytes(whole.folder)
