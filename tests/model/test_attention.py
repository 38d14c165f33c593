"""Attention in float32 under bfloat16: equal to transformers without gradient, as good with it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from splitft.geometry import Span
from splitft.model import open_model
from splitft.specs import ModelSpec
from tiny import VOCAB

BLOCKS = 4
TOKENS = torch.randint(1, VOCAB, (3, 9), generator=torch.manual_seed(1))


def _hidden_and_gradient(folder, dtype: str, attention: str) -> tuple[torch.Tensor, torch.Tensor]:
    segment = open_model(ModelSpec(name=str(folder), dtype=dtype, attention=attention)).segment(
        Span(0, BLOCKS)
    )
    leaf = torch.randn(3, 9, segment.shape.width, generator=torch.manual_seed(2)).to(segment.dtype)
    hidden = segment.run(leaf.requires_grad_())
    hidden.float().square().sum().backward()
    assert leaf.grad is not None
    return hidden.detach().double(), leaf.grad.double()


def test_its_gradients_are_as_near_the_exact_ones_as_those_of_eager_attention(tiny_llama):
    exact = _hidden_and_gradient(tiny_llama, "float64", "eager")
    ours, eager = (_hidden_and_gradient(tiny_llama, "bfloat16", name) for name in ("sdpa", "eager"))
    for found, reference, wanted in zip(ours, eager, exact, strict=True):
        assert (found - wanted).norm() <= 1.25 * (reference - wanted).norm()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@torch.no_grad()
def test_without_gradient_it_is_that_of_transformers(tiny_llama, dtype):
    segment = open_model(ModelSpec(name=str(tiny_llama), dtype=dtype)).segment(
        Span(0, BLOCKS), embedding=True, head=True
    )
    whole = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=segment.dtype).eval()
    logits = segment.logits(segment.run(TOKENS).flatten(0, 1))
    assert torch.equal(logits, whole(TOKENS).logits.flatten(0, 1))
