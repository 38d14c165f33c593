"""DoRA: the direction of a layer's weight by B A, and its magnitude, row by row, by a vector of its own.

    W' = m * (W + scale B A) / ||W + scale B A||        m (out,), norms over each of the `out` rows
    y' = y + (g - 1) (y - bias) + g scale B A x         g = m / ||W + scale B A||

The norm is a constant to the backward pass, as the paper (section 4.3) and peft have it. What is trained,
sent and averaged is the change of m from ||W||, which is 0 at first: every party can make it without weights
that it does not hold, and gradients and Adam's steps are those of m. Weight decay pulls m to ||W||, not to 0.

DoRA: Liu et al. 2024, https://arxiv.org/abs/2402.09353.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from splitft.adapters.state import Factors

RULES = ("factors", "zero-pad", "svd")
"""Aggregation rules that fit: they average magnitudes beside what they make of A and B."""


def oriented(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A layer's weight as (out, in): nn.Linear has it so, GPT-2's Conv1D has it transposed."""
    return weight if isinstance(layer, nn.Linear) else weight.T


def magnitudes(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Norms (1, out) of the rows of a weight (out, in)."""
    norms: torch.Tensor = torch.linalg.vector_norm(weight.to(dtype), dim=1)
    return norms[None]


def rescaled(
    layer: Any, y: torch.Tensor, update: torch.Tensor, A: torch.Tensor, B: torch.Tensor, change: torch.Tensor
) -> torch.Tensor:
    """The layer's output y (..., out) with the update scale B A x, at magnitudes ||W|| + change.

    B comes with its scale. Forms the D x D product once a pass, for its norm.
    """
    with torch.no_grad():
        weight = oriented(layer, layer.weight).to(A.dtype)
        norms = magnitudes(weight, A.dtype)
        whole = magnitudes(torch.addmm(weight, B, A), A.dtype)
    g = ((norms + change) / whole).to(y.dtype)
    linear = y if layer.bias is None else y - layer.bias
    return y + (g - 1).view(-1) * linear + g.view(-1) * update


def whole_magnitudes(
    layers: Mapping[str, Factors], weights: Iterable[tuple[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """m (out,) of every layer that has one, from its weight (out, in) and the change that was learnt."""
    found = {}
    for name, weight in weights:
        change = layers[name].magnitude
        if change is not None:
            found[name] = (magnitudes(weight, change.dtype) + change)[0].contiguous()
    return found
