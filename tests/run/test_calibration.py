"""A calibration times real blocks once, and is then read from the cache."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from splitft.adapters import attach, initial_state
from splitft.geometry import Span
from splitft.model import open_model
from splitft.run import calibration
from splitft.run.fleet import exact_sizes
from splitft.specs import LoraSpec, ModelSpec, TrainingSpec
from splitft.training.ranks import RankPolicy


@pytest.fixture
def measure(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("SPLITFT_CACHE", str(tmp_path))
    monkeypatch.setattr(calibration, "SECONDS", 0.1)
    model = open_model(ModelSpec(name=str(tiny_llama), dtype="float32"))
    ranks = RankPolicy(LoraSpec(rank=4, rank_at_cut=None), model.shape.blocks, "svd", 0)
    return lambda: calibration.measured(model, ranks, TrainingSpec())


def test_what_was_measured_is_positive_and_kept(measure):
    device = measure()
    assert device.block_forward_s_per_token > 0
    assert device.block_backward_s_per_token > 0
    assert device.head_s_per_token > 0
    assert measure() == device


def test_a_damaged_cache_is_measured_again(measure, tmp_path):
    measure()
    (file,) = tmp_path.glob("calibrations/*.json")
    file.write_text("{", encoding="utf-8")
    assert measure().block_forward_s_per_token > 0


def test_a_processor_with_other_instructions_is_measured_anew(measure, tmp_path, monkeypatch):
    measure()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    measure()
    assert len(list(tmp_path.glob("calibrations/*.json"))) == 2


def test_the_memory_of_an_accelerator_is_learnt_from_its_counters(monkeypatch):
    """2 GB of tensors in 2.2 GB, and 0.5 GB of the device that the allocator does not hold."""
    counters = {
        "max_memory_allocated": 2e9, "max_memory_reserved": 2.2e9, "memory_reserved": 1e9,
        "mem_get_info": (8.5e9, 10e9),
    }  # fmt: skip
    module = SimpleNamespace(**{name: lambda device, value=value: value for name, value in counters.items()})
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    found = calibration._memory_constants(torch.device("cuda:0"))
    assert found == {"allocator_slack": pytest.approx(1.1), "runtime_bytes": 0.5e9}
    del module.mem_get_info  # a device that does not tell, such as mps, has the constants of a CPU
    assert calibration._memory_constants(torch.device("mps:0")) == {}
    assert calibration._memory_constants(torch.device("cpu")) == {}


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.1), ("float32", 0.1)])
def test_the_activations_that_a_block_keeps_are_those_that_the_cost_model_counts(
    tiny_llama, dtype, tolerance
):
    model = open_model(ModelSpec(name=str(tiny_llama), dtype=dtype))
    ranks = RankPolicy(LoraSpec(rank=2, rank_at_cut=None), model.shape.blocks, "svd", 0)
    sizes = exact_sizes(model, ranks)
    few, many = (_saved_bytes(model, ranks, tokens) for tokens in (64, 128))
    counted = sizes.kept_elements_per_token * model.dtype.itemsize + sizes.kept_wide_elements_per_token * 4
    assert (many - few) / 64 == pytest.approx(counted, rel=tolerance)


def _saved_bytes(model, ranks, tokens):
    """Bytes of all storages that autograd keeps in the second block."""
    span = Span(0, 2)
    segment = model.segment(span, embedding=True)
    bank = attach(segment.blocks, ranks.lora.targets, ranks.scale, model.dtype)
    layers = {key: size for key, size in bank.sizes.items() if key[0] in span}
    bank.put("s", initial_state(layers, ranks.initial(), 0, torch.float32))
    held = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    with torch.enable_grad(), bank.routed([("s", 1)]):
        hidden = segment.run(torch.zeros(1, tokens, dtype=torch.long), Span(0, 1)).detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            segment.run(hidden, Span(1, 2))
    return sum(nbytes for _, nbytes in held.values())
