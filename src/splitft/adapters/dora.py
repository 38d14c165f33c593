"""DoRA: adapt the direction of a layer's weight by B A, and the magnitude of its rows by a trained vector.

    W' = m * (W + scale B A) / ||W + scale B A||        m (out,), norms over each of the `out` rows
    y' = y + (g - 1) (y - bias) + g scale B A x         g = m / ||W + scale B A||

With dropout, update and y of the term (g - 1) (y - bias) are those of the input with dropout, as in peft.

The norm is a constant to the backward pass, as in the paper (section 4.3) and in peft. The tensor that is
trained, sent and averaged is the change of m from ||W||, which is 0 at first: every party can make it without
weights that it does not hold, and gradients and Adam's steps are those of m. Weight decay pulls m to ||W||,
not to 0.

DoRA: Liu et al. 2024, https://arxiv.org/abs/2402.09353.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from splitft.adapters.state import Factors
from splitft.adapters.targets import weight_of


def magnitudes(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the norms (1, out) of the rows of a weight (out, in)."""
    norms: torch.Tensor = torch.linalg.vector_norm(weight.to(dtype), dim=1)
    return norms[None]


def direction_gain(layer: Any, A: torch.Tensor, B: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Return g (1, out) at magnitudes ||W|| + change; `B` includes the scale.

    Forms the D x D product once a pass, for its norm.
    """
    with torch.no_grad():
        weight = weight_of(layer).to(A.dtype)
        norms = magnitudes(weight, A.dtype)
        whole = magnitudes(torch.addmm(weight, B, A), A.dtype)
    return (norms + change) / whole


def rescaled(
    layer: Any, y: torch.Tensor, turned: torch.Tensor, update: torch.Tensor, gain: torch.Tensor
) -> torch.Tensor:
    """Return the layer's output (..., out) from its output y, the update scale B A x and g (1, out).

    `turned` is the layer's output that g - 1 applies to: y, or that of the input with dropout.
    """
    g = gain.to(y.dtype).view(-1)
    linear = turned if layer.bias is None else turned - layer.bias
    return y + (g - 1) * linear + g * update


def whole_magnitudes(
    layers: Mapping[str, Factors], weights: Iterable[tuple[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Return m (out,) of every layer that has one, from its weight (out, in) and the learnt change."""
    found = {}
    for name, weight in weights:
        change = layers[name].magnitude
        if change is not None:
            found[name] = (magnitudes(weight, change.dtype) + change)[0].contiguous()
    return found
