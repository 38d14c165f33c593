"""A layer's output at other magnitudes is that of the weight written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from splitft.adapters import AdapterState, Factors
from splitft.adapters.dora import direction_gain, rescaled
from splitft.adapters.targets import oriented
from splitft.errors import AdapterError


@pytest.mark.parametrize("layer", [nn.Linear(5, 7), nn.Linear(5, 7, bias=False), Conv1D(7, 5)], ids=str)
def test_the_output_is_that_of_the_rescaled_weight_and_the_norm_is_a_constant(layer):
    generator = torch.Generator().manual_seed(0)
    layer = layer.double().requires_grad_(False)
    x, A, B, change = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 3, 5), (2, 5), (7, 2), (1, 7))
    )
    for tensor in (A, B, change):
        tensor.requires_grad_()
    weight, bias = oriented(layer, layer.weight), 0 if layer.bias is None else layer.bias
    whole = weight + B @ A
    m = weight.norm(dim=1) + change[0]
    wanted = x @ ((m / whole.detach().norm(dim=1))[:, None] * whole).T + bias
    y = layer(x)
    found = rescaled(layer, y, y, x @ A.T @ B.T, direction_gain(layer, A, B, change))
    torch.testing.assert_close(found, wanted)
    inputs = (A, B, change)
    theirs, ours = (torch.autograd.grad(y.square().sum(), inputs) for y in (wanted, found))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_a_state_with_magnitudes_survives_as_tensors_and_a_strange_shape_is_refused():
    state = AdapterState({(3, "q_proj"): Factors(torch.ones(2, 5), torch.ones(7, 2), torch.ones(1, 7))})
    again = AdapterState.from_tensors(state.tensors())
    assert set(again.tensors()) == {"3.q_proj.A", "3.q_proj.B", "3.q_proj.M"}
    with pytest.raises(AdapterError, match="7 outputs"):
        Factors(torch.ones(2, 5), torch.ones(7, 2), torch.ones(1, 6))
