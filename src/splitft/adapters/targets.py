"""Linear layers that can be adapted: nn.Linear, and GPT-2's Conv1D, whose weight is transposed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from splitft.errors import AdapterError

ATTENTION_NAMES = ("attn", "attention", "self_attn", "self_attention")


def chosen_layers(block: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Return the paths of the linear layers of one block that `targets` names.

    `targets`: "attention", "all-linear", or names; a name fits a layer whose path ends with it. Raises
    AdapterError, listing the layers there are, if a name fits none.
    """
    linear = [path for path, module in block.named_modules() if is_linear(module)]
    if targets == "all-linear":
        return linear
    if targets == "attention":
        chosen = [path for path in linear if set(path.split(".")[:-1]) & set(ATTENTION_NAMES)]
        if not chosen:
            raise AdapterError(f"no attention layers in this family; name targets among {', '.join(linear)}")
        return chosen
    names = [targets] if isinstance(targets, str) else list(targets)
    fitting = {name: [p for p in linear if p == name or p.endswith(f".{name}")] for name in names}
    if unknown := [name for name, paths in fitting.items() if not paths]:
        raise AdapterError(f"no linear layer named {', '.join(unknown)}; there are {', '.join(linear)}")
    return [path for path in linear if any(path in paths for paths in fitting.values())]


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer that can be adapted."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Return whether a linear layer is a Conv1D."""
    return type(module).__name__ == "Conv1D"


def layer_sizes(layer: Any) -> tuple[int, int]:
    """Return (in, out) of a linear layer."""
    if isinstance(layer, nn.Linear):  # also of one whose weight is held in other shapes
        return layer.in_features, layer.out_features
    inputs, out = layer.weight.shape
    return int(inputs), int(out)


def weight_of(layer: Any) -> torch.Tensor:
    """Return a layer's weight as numbers (out, in), also of a layer that holds it in fewer bits."""
    if hasattr(layer, "full_weight"):
        weight: torch.Tensor = layer.full_weight()
        return weight
    return oriented(layer, layer.weight)


def oriented(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """Return a layer's weight as (out, in)."""
    return weight.T if is_transposed(layer) else weight
