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

With `training.clip` the gradient of a slot is scaled down to that norm (Pascanu et al. 2013,
https://arxiv.org/abs/1211.5063). Client and server each know the gradient of their own blocks and clip it
alone: the norm over both would be known only after the server has answered and would have to step. So a
clipped run depends on the cut, unlike any other.

LoRA+ gives B a higher learning rate than A (Hayou et al. 2024, https://arxiv.org/abs/2402.12354).
AdamW: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.optim.adamw import adamw

from splitft.adapters.grouped import note_change
from splitft.errors import AdapterError
from splitft.geometry import Span
from splitft.specs import TrainingSpec

ParameterKey = tuple[int, str, str]
"""(block, target, "A", "B" or "M")."""
Moments = dict[str, torch.Tensor]
"""Flat names -> tensors: `7.self_attn.q_proj.A.exp_avg`; empty for an optimizer without state."""
_Update = tuple[torch.Tensor, torch.Tensor, Moments]
"""A parameter, its gradient and its state."""

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
        self._parameters, self._spec, self._lr_ratio = dict(parameters), spec, lr_ratio
        self._first = self._steps = (round - 1) * spec.steps
        self._state: dict[ParameterKey, Moments] = {}
        if moments:
            self._restore(moments)

    def step(self, divide_by: float = 1) -> None:
        """Apply the gradients, divided by `divide_by`, and clear them."""
        step_together([self], divide_by)

    def at(self, step: int) -> LocalOptimizer:
        """Go to a local step of the round, from 0, for the learning rate of the next update; return self."""
        self._steps = self._first + step
        return self

    def forget(self) -> None:
        """Clear the gradients without applying them."""
        for parameter in self._parameters.values():
            parameter.grad = None

    @property
    def moments_per_number(self) -> int:
        """Numbers that it keeps for each number that it trains."""
        return 2 if self._spec.optimizer == "adamw" else 0

    def follow(self, parameters: Mapping[ParameterKey, nn.Parameter]) -> None:
        """Go on with the same parameters that have moved to another device; moments move along."""
        self._parameters = dict(parameters)
        for key, state in self._state.items():
            device = self._parameters[key].device
            self._state[key] = {name: value.to(device) for name, value in state.items()}

    def moments(self) -> Moments:
        """Return a copy of the optimizer's state, on the CPU."""
        return {
            ".".join(map(str, (*key, name))): value.detach().to("cpu", copy=True).contiguous()
            for key, state in self._state.items()
            for name, value in state.items()
        }

    def updates(self) -> Iterator[tuple[float, _Update]]:
        """Yield the tensors of each parameter that has a gradient, with its learning rate; count a step."""
        factor = lr_factor(self._spec, self._steps)
        self._steps += 1
        for key, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            gradient = _in_layout_of(parameter, parameter.grad)
            if self._spec.optimizer == "adamw" and key not in self._state:
                self._state[key] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
            lr = self._spec.lr * (self._lr_ratio if key[2] == "B" else 1.0) * factor
            yield lr, (parameter, gradient, self._state.get(key, {}))

    @property
    def spec(self) -> TrainingSpec:
        """Kind of optimizer, and its weight decay."""
        return self._spec

    def _restore(self, moments: Moments) -> None:
        if self._spec.optimizer != "adamw":
            return
        by_parameter: dict[str, Moments] = {}
        for name, value in moments.items():
            parameter_name, _, field = name.rpartition(".")
            by_parameter.setdefault(parameter_name, {})[field] = value
        for key, parameter in self._parameters.items():
            state = by_parameter.get(".".join(map(str, key)), {})
            # all of a parameter's state or none: after a change of rank its moments have another shape
            if state and all(value.dim() == 0 or value.shape == parameter.shape for value in state.values()):
                self._state[key] = {
                    field: _in_layout_of(parameter, value.detach().to(parameter.device, copy=True))
                    for field, value in state.items()
                }


@torch.no_grad()
def step_together(optimizers: Sequence[LocalOptimizer], divide_by: float = 1) -> None:
    """Apply the gradients of several slots, divided by `divide_by`, and clear them.

    One call of the multi-tensor kernel for all slots of the same learning rate: 64 slots take as many calls
    as one. Each tensor is updated by itself, so that the numbers are those of one slot after the other.
    """
    alike: dict[tuple[str, float, float], list[_Update]] = {}
    for optimizer in optimizers:
        spec, own = optimizer.spec, list(optimizer.updates())
        of_slot = [gradient for _, (_, gradient, _) in own]
        if divide_by != 1 and of_slot:
            torch._foreach_div_(of_slot, divide_by)
        if spec.clip is not None:
            clip_norm(of_slot, spec.clip)
        for lr, update in own:
            alike.setdefault((spec.optimizer, spec.weight_decay, lr), []).append(update)
    for (kind, weight_decay, lr), updates in alike.items():
        parameters, gradients, states = (list(column) for column in zip(*updates, strict=True))
        STEPS[kind](parameters, gradients, states, lr, weight_decay)
        for parameter in parameters:
            note_change(parameter)
    for optimizer in optimizers:
        optimizer.forget()


def clip_norm(gradients: Sequence[torch.Tensor], largest: float) -> None:
    """Scale gradients down in place, if their common norm is above `largest` (as torch's clip_grad_norm_)."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for gradient in gradients:
        by_device.setdefault(gradient.device, []).append(gradient)
    if not by_device:
        return
    where = next(iter(by_device))
    norms = [norm.to(where) for own in by_device.values() for norm in torch._foreach_norm(own)]
    share = (largest / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
    for device, own in by_device.items():
        torch._foreach_mul_(own, share.to(device))


def _adamw(
    parameters: list[torch.Tensor],
    gradients: list[torch.Tensor],
    states: list[Moments],
    lr: float,
    weight_decay: float,
) -> None:
    exp_avgs, exp_avg_sqs, steps = (
        [state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")
    )
    adamw(
        parameters,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=0.9,
        beta2=0.999,
        lr=lr,
        weight_decay=weight_decay,
        eps=1e-8,
        maximize=False,
    )


def _sgd(
    parameters: list[torch.Tensor],
    gradients: list[torch.Tensor],
    states: list[Moments],
    lr: float,
    weight_decay: float,
) -> None:
    if weight_decay:
        torch._foreach_add_(gradients, parameters, alpha=weight_decay)
    torch._foreach_add_(parameters, gradients, alpha=-lr)


STEPS = {"adamw": _adamw, "sgd": _sgd}
"""Update of lists of parameters at one learning rate, by `training.optimizer`."""


def _in_layout_of(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the strides of its parameter: the fused kernel reads storage in order."""
    contiguous = value.is_contiguous() and parameter.is_contiguous()
    if value.dim() == 0 or contiguous or value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def moments_within(moments: Moments, blocks: Span | Iterable[int]) -> Moments:
    """Return the moments of these blocks. Raise AdapterError for a name that is not a moment's."""
    wanted = set(blocks)
    try:
        return {name: value for name, value in moments.items() if int(name.split(".")[0]) in wanted}
    except ValueError as error:
        raise AdapterError(f"not a name of a moment: {error}") from error
