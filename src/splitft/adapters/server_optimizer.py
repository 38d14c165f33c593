"""Step the global factors on the server, with the round's mean change as the gradient.

    delta = mean of the participants' factors - global factors
    fedavgm   v = beta v + delta                             x = x + lr v
    nesterov  v = beta v + delta                             x = x + lr (delta + beta v)
    fedadam   m = b1 m + (1 - b1) delta,
              v = b2 v + (1 - b2) delta^2                    x = x + lr m / (sqrt(v) + tau)

FedAvgM: Hsu et al. 2019, https://arxiv.org/abs/1909.06335. Nesterov momentum is torch's SGD on -delta, the
outer optimizer of DiLoCo (lr 0.7, beta 0.9): Douillard et al. 2023, https://arxiv.org/abs/2311.08105.
FedAdam: Reddi et al. 2021, algorithm 2 (no bias correction), https://arxiv.org/abs/2003.00295; v begins at
tau^2. The factors must keep their axes from round to round, so rules that make new ones (svd, stack) do not
support it. Where cuts change a block's rank, new rows begin at the mean, without momentum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from splitft.adapters.state import AdapterState
from splitft.specs import AggregateSpec

Memory = Mapping[str, torch.Tensor]
"""State of the optimizer, by names such as `7.self_attn.q_proj.A.momentum`."""
Step = Callable[[AggregateSpec, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]
"""(options, delta, state of one factor, changed in place) -> change of the factor."""


def fedavgm(spec: AggregateSpec, delta: torch.Tensor, memory: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the step of FedAvgM."""
    return (1.0 if spec.server_lr is None else spec.server_lr) * _momentum(spec, delta, memory)


def nesterov(spec: AggregateSpec, delta: torch.Tensor, memory: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the step of SGD with Nesterov momentum (DiLoCo)."""
    ahead = delta + spec.server_momentum * _momentum(spec, delta, memory)
    return (0.7 if spec.server_lr is None else spec.server_lr) * ahead


def fedadam(spec: AggregateSpec, delta: torch.Tensor, memory: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the step of FedAdam."""
    first, second = spec.server_betas
    momentum = memory.get("momentum", torch.zeros_like(delta))
    variance = memory.get("variance", torch.full_like(delta, spec.server_tau**2))
    memory["momentum"] = first * momentum + (1 - first) * delta
    memory["variance"] = second * variance + (1 - second) * delta**2
    lr = 0.01 if spec.server_lr is None else spec.server_lr
    return lr * memory["momentum"] / (memory["variance"].sqrt() + spec.server_tau)


SERVER_OPTIMIZERS: dict[str, Step] = {"fedavgm": fedavgm, "nesterov": nesterov, "fedadam": fedadam}
"""Steps by name; `none` uses the mean itself."""


def server_step(
    spec: AggregateSpec, before: AdapterState, mean: AdapterState, memory: Memory
) -> tuple[AdapterState, dict[str, torch.Tensor]]:
    """Return the next global factors and the optimizer's state, from the last factors and their mean."""
    if spec.server_optimizer == "none":
        return mean, {}
    step = SERVER_OPTIMIZERS[spec.server_optimizer]
    old, after, kept = before.tensors(), {}, dict(memory)
    fill = {"momentum": 0.0, "variance": spec.server_tau**2}
    for name, new in mean.tensors().items():
        start = _like(old[name], new, new)
        own = {
            part: _like(kept[key], new, value)
            for part, value in fill.items()
            if (key := f"{name}.{part}") in kept
        }
        after[name] = start + step(spec, new - start, own)
        kept.update((f"{name}.{part}", tensor) for part, tensor in own.items())
    return AdapterState.from_tensors(after), kept


def _momentum(spec: AggregateSpec, delta: torch.Tensor, memory: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return v with the round's change in it, and keep it."""
    before = memory.get("momentum")
    memory["momentum"] = delta if before is None else spec.server_momentum * before + delta
    return memory["momentum"]


def _like(tensor: torch.Tensor, wanted: torch.Tensor, fill: torch.Tensor | float) -> torch.Tensor:
    """Return a tensor in the shape of another: cut down, or extended with `fill`."""
    if tensor.shape == wanted.shape:
        return tensor
    rows, columns = (min(pair) for pair in zip(tensor.shape, wanted.shape, strict=True))
    grown = fill.clone() if isinstance(fill, torch.Tensor) else torch.full_like(wanted, fill)
    grown[:rows, :columns] = tensor[:rows, :columns]
    return grown
