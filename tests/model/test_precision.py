"""`model.dtype: auto` is the type that the device computes fastest, and a run keeps the one it began in."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml

import splitft
from laws.federations import write_text
from runs import StoppedError, adapter_bytes, settings, stop_at
from splitft.config import from_mapping
from splitft.errors import RunError
from splitft.model import open_model, precision
from splitft.model.devices import CPU
from splitft.model.precision import Precision, describe, fastest, native_precision
from splitft.specs import ModelSpec
from splitft.tracking.events import StepDone


@pytest.fixture
def processor(monkeypatch, tmp_path):
    """Sets the instructions of the processor, and the gain that a measurement finds; counts measurements."""
    monkeypatch.setenv("SPLITFT_CACHE", str(tmp_path / "cache"))
    measured = []

    def described(instructions, gain):
        def measure():
            measured.append(gain)
            return gain

        monkeypatch.setattr(precision, "bfloat16_instructions", lambda: instructions)
        monkeypatch.setattr(precision, "_measure", measure)
        return measured

    return described


@pytest.mark.parametrize(
    ("instructions", "gain", "expected"),
    [
        ((), 5.0, "float32"),  # nothing to measure
        (("avx512_bf16",), 1.9, "bfloat16"),
        (("avx512_bf16",), 0.95, "bfloat16"),  # within what other programs disturb
        (("amx_bf16",), 0.4, "float32"),  # torch does not use them
        (None, 1.9, "bfloat16"),  # not known to torch
        (None, 1.05, "float32"),
        (None, 0.2, "float32"),
    ],
)
def test_a_processor_computes_in_bfloat16_if_it_has_it_and_gains(processor, instructions, gain, expected):
    measured = processor(instructions, gain)
    assert native_precision(CPU).dtype == expected
    assert len(measured) == (instructions != ())


def test_a_processor_is_measured_once(processor):
    measured = processor(("avx512_bf16",), 1.9)
    assert native_precision(CPU) == native_precision(CPU)
    assert measured == [1.9]
    processor(("avx512_bf16", "amx_bf16"), 2.5)
    assert "2.5 times" in native_precision(CPU).reason


def test_a_cache_that_cannot_be_written_only_costs_time(processor, tmp_path):
    measured = processor(None, 2.0)
    (tmp_path / "cache").write_text("a file in the folder's place")
    assert native_precision(CPU) == native_precision(CPU)
    assert len(measured) == 2


def test_a_damaged_measurement_is_made_again(processor, tmp_path):
    processor(None, 2.0)
    native_precision(CPU)
    (file,) = tmp_path.glob("cache/precision/*.json")
    file.write_text("-1")
    assert native_precision(CPU).dtype == "bfloat16"
    assert json.loads(file.read_text()) == 2.0


@pytest.mark.skipif(
    "avx512_bf16" not in (precision.bfloat16_instructions() or ()), reason="needs a processor with bfloat16"
)
@pytest.mark.parametrize(("limit", "expected"), [("ALL", "bfloat16"), ("AVX512_CORE_VNNI", "float32")])
def test_a_real_measurement_finds_whether_the_instructions_are_used(tmp_path, limit, expected):
    program = "from splitft.model.precision import *; print(native_precision(CPU).dtype)"
    limits = {"ONEDNN_MAX_CPU_ISA": limit, "SPLITFT_CACHE": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | limits, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == [expected]


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((9, 0), "bfloat16"),
        ((8, 0), "bfloat16"),
        ((7, 5), "float16"),
        ((7, 0), "float16"),
        ((6, 1), "float32"),
    ],
)
def test_a_gpu_computes_in_the_type_of_its_generation(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert native_precision(torch.device("cuda:1")).dtype == expected


def test_devices_that_are_fastest_in_different_types_share_float32(monkeypatch):
    native = {"cpu": "float32", "cuda": "bfloat16"}
    monkeypatch.setattr(precision, "native_precision", lambda device: Precision(native[device.type], "so"))
    gpus = [torch.device("cuda:0"), torch.device("cuda:1")]
    assert fastest(gpus) == Precision("bfloat16", "so")
    assert fastest([*gpus, CPU]).dtype == "float32"
    assert "cuda:1 bfloat16, cpu float32" in fastest([*gpus, CPU]).reason


def test_a_type_that_is_given_is_kept_and_what_is_faster_is_said(tiny_llama, processor):
    processor((), 1.0)
    assert open_model(ModelSpec(name=str(tiny_llama))).dtype == torch.float32
    assert open_model(ModelSpec(name=str(tiny_llama), dtype="bfloat16")).dtype == torch.bfloat16
    assert describe("bfloat16") == (
        "bfloat16 (as given; float32 is faster: this processor has no bfloat16 instructions)"
    )
    assert describe("float32") == "float32 (this processor has no bfloat16 instructions)"


@pytest.fixture
def config(tiny_llama, tmp_path):
    """A run with `dtype: auto`."""
    cpu = {"server": "cpu", "clients": "cpu"}  # whose instructions the tests choose
    changes = {"model": {"dtype": "auto"}, "training": {"rounds": 2, "steps": 2}, "devices": cpu}
    return from_mapping(settings(tiny_llama, write_text(tmp_path / "notes.jsonl"), **changes))


def test_a_run_goes_on_in_the_type_that_it_began_in(config, tmp_path, processor):
    processor(("avx512_bf16",), 2.0)
    told = []
    wanted = adapter_bytes(splitft.train(config, tmp_path / "whole", listeners=[told.append]).folder)
    assert told[0].precision.startswith("bfloat16 (avx512_bf16")
    with pytest.raises(StoppedError):
        splitft.train(config, tmp_path / "run", listeners=[stop_at(StepDone, round=2)])
    assert _written(tmp_path / "run") == "bfloat16"
    processor((), 2.0)  # the folder has moved to a machine without bfloat16
    assert adapter_bytes(splitft.train(config, tmp_path / "run", resume=True).folder) == wanted
    assert _written(tmp_path / "run") == "bfloat16"


def test_a_run_does_not_go_on_in_another_type_that_is_given(config, tmp_path, processor):
    processor((), 2.0)
    with pytest.raises(StoppedError):
        splitft.train(config, tmp_path / "run", listeners=[stop_at(StepDone, round=1)])
    other = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    with pytest.raises(RunError, match=r"model.dtype \(was 'float32', now 'bfloat16'\)"):
        splitft.train(other, tmp_path / "run", resume=True)


def _written(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())["model"]["dtype"]
