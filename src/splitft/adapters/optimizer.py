"""The local optimizer of one slot of adapters, and its moments as movable data.

Adam keeps its moments by tensor, so a model's optimizer can be cut wherever its blocks are: client and server
each step their own blocks and together do what one optimizer over the whole model would do. When moments
are kept across rounds, those of a block go where the block goes.

LoRA+ gives B a higher learning rate than A (Hayou et al. 2024, https://arxiv.org/abs/2402.12354).
AdamW: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from splitft.adapters.rates import share_at
from splitft.errors import AdapterError
from splitft.geometry import Span
from splitft.specs import TrainingSpec

ParameterKey = tuple[int, str, str]
"""(block, target, "A", "B" or "M")."""
Moments = dict[str, torch.Tensor]
"""Flat names -> tensors: `7.self_attn.q_proj.A.exp_avg`; empty for an optimizer without state."""


class LocalOptimizer:
    """torch's AdamW or SGD over a slot's factors."""

    def __init__(
        self,
        parameters: Mapping[ParameterKey, nn.Parameter],
        spec: TrainingSpec,
        moments: Moments | None = None,
        lr_ratio: float = 1.0,
        round: int = 1,
    ) -> None:
        """Begin a round; `lr_ratio` is the learning rate of B over that of A (LoRA+)."""
        self._parameters, self._spec = dict(parameters), spec
        self._taken = (round - 1) * spec.steps
        tensors: list[Any] = list(self._parameters.values())
        if lr_ratio != 1 and tensors:
            halves = {half: [p for key, p in self._parameters.items() if key[2] == half] for half in "ABM"}
            rates = {"A": spec.lr, "B": spec.lr * lr_ratio, "M": spec.lr}
            tensors = [{"params": held, "lr": rates[half]} for half, held in halves.items() if held]
        options: dict[str, Any] = {"lr": spec.lr, "weight_decay": spec.weight_decay}
        self._optimizer: torch.optim.Optimizer | None = None
        if tensors:  # a client whose blocks have no targets trains nothing
            if spec.optimizer == "adamw":
                self._optimizer = torch.optim.AdamW(tensors, fused=True, **options)
            else:
                self._optimizer = torch.optim.SGD(tensors, **options)
        groups = self._optimizer.param_groups if self._optimizer else []
        self._rates = [group["lr"] for group in groups]
        if moments:
            self._restore(moments)

    def step(self, divide_by: float = 1) -> None:
        """Apply the gradients, divided by a number, and clear them."""
        if self._optimizer is None:
            return
        if divide_by != 1:
            for parameter in self._parameters.values():
                if parameter.grad is not None:
                    parameter.grad.div_(divide_by)
        share = share_at(self._spec, self._taken)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        self._optimizer.step()
        self._taken += 1
        self.forget()

    def forget(self) -> None:
        """Clear the gradients without applying them."""
        if self._optimizer is not None:
            self._optimizer.zero_grad(set_to_none=True)

    def moments(self) -> Moments:
        """A copy of the state."""
        flat: Moments = {}
        for key, parameter in self._parameters.items():
            state = self._optimizer.state.get(parameter, {}) if self._optimizer else {}
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    flat[".".join(map(str, (*key, name)))] = value.detach().clone()
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
            # all of it or none: after a change of rank, a step count without its moments is no state
            if state and all(value.dim() == 0 or value.shape == parameter.shape for value in state.values()):
                self._optimizer.state[parameter] = {field: v.detach().clone() for field, v in state.items()}


def moments_within(moments: Moments, blocks: Span | Iterable[int]) -> Moments:
    """The moments of these blocks."""
    wanted = set(blocks)
    try:
        return {name: value for name, value in moments.items() if int(name.split(".")[0]) in wanted}
    except ValueError as error:
        raise AdapterError(f"not a name of a moment: {error}") from error
