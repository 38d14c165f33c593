"""Blocks that move to and fro between cuts, on a device that is not the host."""

from __future__ import annotations

import pytest
import torch

from accelerator import FIRST, SECOND
from splitft.geometry import Span
from splitft.model import CPU, open_model
from splitft.model.weights import WEIGHTS, Checkpoint
from splitft.model.weights.lately_held import LatelyHeld
from splitft.specs import ModelSpec


@pytest.fixture
def copies(monkeypatch):
    """Begin without copies; returns those of the process."""
    lately = LatelyHeld(10**6)
    monkeypatch.setattr(WEIGHTS, "lately_held", lately)
    return lately


@pytest.fixture
def read_names(monkeypatch):
    """Names of the tensors that were read from the model's files."""
    names, read = [], Checkpoint.read

    def noted(self, wanted):
        wanted = list(wanted)
        names.extend(wanted)
        return read(self, wanted)

    monkeypatch.setattr(Checkpoint, "read", noted)
    return names


def _weights(segment, block: int) -> list[torch.Tensor]:
    return [parameter.detach().cpu().clone() for parameter in segment.blocks[block].parameters()]


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_a_block_that_comes_back_is_not_read_again(tiny_llama, fake_devices, copies, read_names, quantize):
    if quantize == "int8":
        pytest.importorskip("bitsandbytes")
    model = open_model(ModelSpec(name=str(tiny_llama), dtype="float32", quantize=quantize))
    segment = model.at("server").segment(Span(0, 4), device=FIRST)
    before = _weights(segment, 1)
    segment.resize(Span(2, 4))
    read_names.clear()
    segment.resize(Span(1, 4))
    assert not [name for name in read_names if ".layers.1." in name]
    assert segment.blocks[1].self_attn.q_proj.weight.device == FIRST
    for held, then in zip(_weights(segment, 1), before, strict=True):
        assert torch.equal(held, then)


def test_another_device_takes_the_same_copy(tiny_llama, fake_devices, copies, read_names):
    model = open_model(ModelSpec(name=str(tiny_llama), dtype="float32"))
    model.segment(Span(0, 2), device=FIRST).resize(Span(0, 1))
    read_names.clear()
    segment = model.segment(Span(1, 2), device=SECOND)
    assert not read_names
    assert segment.blocks[1].self_attn.q_proj.weight.device == SECOND


def test_copies_stay_within_their_budget_and_the_longest_unused_goes_first(tiny_llama, fake_devices, copies):
    segment = open_model(ModelSpec(name=str(tiny_llama), dtype="float32")).segment(Span(0, 4), device=FIRST)
    of_a_block = sum(weight.nbytes for weight in _weights(segment, 0))
    copies.budget_bytes = 2 * of_a_block
    names = {}
    for cut in (1, 2, 3):
        before = set(copies._copies)
        segment.resize(Span(cut, 4))
        names[cut] = set(copies._copies) - before
    assert sum(copy.nbytes for copy in copies._copies.values()) == 2 * of_a_block
    assert set(copies._copies) == names[2] | names[3]


def test_nothing_is_kept_where_the_host_is_the_device_or_without_a_budget(tiny_llama, fake_devices, copies):
    model = open_model(ModelSpec(name=str(tiny_llama), dtype="float32"))
    model.segment(Span(0, 4), device=CPU).resize(Span(3, 4))
    copies.budget_bytes = 0
    model.segment(Span(0, 4), device=FIRST).resize(Span(3, 4))
    assert not copies._copies


def test_a_block_of_another_type_is_another_block(tiny_llama, fake_devices, copies, read_names):
    spec = ModelSpec(name=str(tiny_llama), dtype="float32")
    open_model(spec).segment(Span(0, 2), device=FIRST).resize(Span(0, 1))
    read_names.clear()
    open_model(spec.model_copy(update={"dtype": "bfloat16"})).segment(Span(1, 2), device=FIRST)
    assert [name for name in read_names if ".layers.1." in name]
