"""Step the adapters of one slot, at the learning rate of a schedule; its moments are plain data.

Adam keeps its moments by tensor, so the optimizer splits wherever the model does: client and server each step
their own blocks, and together do what one optimizer over the whole model does. Where moments are kept across
rounds, those of a block move with the block.

    lr(t) = lr * (t + 1) / warmup                      t < warmup
          = lr * shape((t - warmup) / (T - warmup))    T = rounds * steps
    shape(p) = 1 | 1 - p | (1 + cos(pi p)) / 2         constant | linear | cosine

t counts the local steps of the run, so a client that misses rounds, and both sides of every cut, have the
same rate in the same step. Linear and cosine are those of transformers, except that warm-up begins at
lr / warmup instead of 0, so that the first step is not lost.

LoRA+ gives B a higher learning rate than A (Hayou et al. 2024, https://arxiv.org/abs/2402.12354).
AdamW: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from splitft.errors import AdapterError
from splitft.geometry import Span
from splitft.specs import TrainingSpec

ParameterKey = tuple[int, str, str]
"""(block, target, "A", "B" or "M")."""
Moments = dict[str, torch.Tensor]
"""Flat names -> tensors: `7.self_attn.q_proj.A.exp_avg`; empty for an optimizer without state."""

LR_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: (1.0 + math.cos(math.pi * progress)) / 2,
}
"""Factor of the learning rate after warm-up, by progress from 0 to 1."""


def lr_factor(spec: TrainingSpec, step: int) -> float:
    """Return the factor of the learning rate at a local step of the run, counted from 0."""
    if step < spec.warmup:
        return (step + 1) / spec.warmup
    remaining = max(1, spec.rounds * spec.steps - spec.warmup)
    return max(0.0, LR_SHAPES[spec.schedule](min(1.0, (step - spec.warmup) / remaining)))


class LocalOptimizer:
    """AdamW or SGD over a slot's factors."""

    def __init__(
        self,
        parameters: Mapping[ParameterKey, nn.Parameter],
        spec: TrainingSpec,
        moments: Moments | None = None,
        lr_ratio: float = 1.0,
        round: int = 1,
    ) -> None:
        """Begin a round (from 1); `lr_ratio` is the learning rate of B over that of A (LoRA+)."""
        self._parameters, self._spec = dict(parameters), spec
        self._steps = (round - 1) * spec.steps
        tensors: list[Any] = list(self._parameters.values())
        if lr_ratio != 1 and tensors:
            parts = {part: [p for key, p in self._parameters.items() if key[2] == part] for part in "ABM"}
            rates = {"A": spec.lr, "B": spec.lr * lr_ratio, "M": spec.lr}
            tensors = [{"params": group, "lr": rates[part]} for part, group in parts.items() if group]
        options: dict[str, Any] = {"lr": spec.lr, "weight_decay": spec.weight_decay}
        self._optimizer: torch.optim.Optimizer | None = None
        if tensors:  # none where a client's blocks have no target layers
            if spec.optimizer == "adamw":
                self._optimizer = torch.optim.AdamW(tensors, fused=True, **options)
            else:
                self._optimizer = torch.optim.SGD(tensors, **options)
        groups = self._optimizer.param_groups if self._optimizer else []
        self._base_lrs = [group["lr"] for group in groups]
        if moments:
            self._restore(moments)

    def step(self, divide_by: float = 1) -> None:
        """Apply the gradients, divided by `divide_by`, and clear them."""
        if self._optimizer is None:
            return
        if divide_by != 1:
            for parameter in self._parameters.values():
                if parameter.grad is not None:
                    parameter.grad.div_(divide_by)
        factor = lr_factor(self._spec, self._steps)
        for group, lr in zip(self._optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = lr * factor
        self._optimizer.step()
        self._steps += 1
        self.forget()

    def forget(self) -> None:
        """Clear the gradients without applying them."""
        if self._optimizer is not None:
            self._optimizer.zero_grad(set_to_none=True)

    def moments(self) -> Moments:
        """Return a copy of the optimizer's state, on the CPU."""
        flat: Moments = {}
        for key, parameter in self._parameters.items():
            state = self._optimizer.state.get(parameter, {}) if self._optimizer else {}
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    flat[".".join(map(str, (*key, name)))] = value.detach().to("cpu", copy=True)
        return flat

    def _restore(self, moments: Moments) -> None:
        if self._optimizer is None:
            return
        by_parameter: dict[str, Moments] = {}
        for name, value in moments.items():
            parameter_name, _, field = name.rpartition(".")
            by_parameter.setdefault(parameter_name, {})[field] = value
        for key, parameter in self._parameters.items():
            state = by_parameter.get(".".join(map(str, key)), {})
            # all of a parameter's state or none: after a change of rank its moments have another shape
            if state and all(value.dim() == 0 or value.shape == parameter.shape for value in state.values()):
                self._optimizer.state[parameter] = {
                    field: value.detach().to(parameter.device, copy=True) for field, value in state.items()
                }


def moments_within(moments: Moments, blocks: Span | Iterable[int]) -> Moments:
    """Return the moments of these blocks. Raise AdapterError for a name that is not a moment's."""
    wanted = set(blocks)
    try:
        return {name: value for name, value in moments.items() if int(name.split(".")[0]) in wanted}
    except ValueError as error:
        raise AdapterError(f"not a name of a moment: {error}") from error
