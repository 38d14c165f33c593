"""Bound what one client can change in a round, and hide it in noise: DP-FedAvg on adapters.

    start_i     the factors client i began the round with       (public: from global factors and its cut)
    update_i    its factors after the round - start_i           over all L blocks, wherever they were trained
    clipped_i   update_i * min(1, C / ||update_i||)             L2 over all factors together
    global    = mean_i(start_i + clipped_i) + N(0, (sigma C / n)^2) on every factor that is trained

McMahan et al. 2018, arXiv 1710.06963, with the server adding the noise. All n participants count alike:
weights by tokens would themselves tell how much text a client has, and let one client move the mean further.

The promise: whoever gets the global adapters of all rounds (other clients, and who loads the export) cannot
tell, but by epsilon at delta, whether one client's updates were replaced by zeros (zero-out neighbours:
Kairouz et al. 2021, arXiv 2103.00039), for the mean then moves by at most C / n. Against the replacement of a
client's text by any other, the mean moves by 2 C / n: double `mu` for that. Rounds compose; see `accounting`.

It does not hide anything from the server, which sees each update and, in split learning, the hidden states
and gradients besides. Noise that each client adds to its own upload would not help there either: the server
itself trains the blocks after the cut for it. The bound needs a rule whose result moves no further than its
members do: `LINEAR_RULES`, means of factors. The mean of products (svd) does not: a factor moved by C moves
its product by C times the size of the other factor. And who reads the events of a run reads exact losses.
"""

from __future__ import annotations

import math

import torch

from splitft.adapters import AdapterState
from splitft.adapters.state import Factors, Key

LINEAR_RULES = ("factors", "zero-pad", "ffa")
"""Aggregation rules that average factors, so that clipping bounds what one client changes."""


def update_norm(start: AdapterState, trained: AdapterState) -> float:
    """L2 norm of the change of all factors together; infinite if a number is not finite."""
    total = 0.0
    for key, after in trained.items():
        before = start[key]
        for new, old in ((after.A, before.A), (after.B, before.B)):
            total += float((new.double() - old.double()).square().sum())
    return math.sqrt(total) if math.isfinite(total) else math.inf


def clipped(start: AdapterState, trained: AdapterState, clip_norm: float) -> AdapterState:
    """`trained`, no further than `clip_norm` from `start`; an update that is not finite becomes none."""
    norm = update_norm(start, trained)
    if norm <= clip_norm:
        return trained
    factor = clip_norm / norm
    if factor == 0:
        return AdapterState({key: start[key] for key in trained})
    return AdapterState({
        key: Factors(_toward(start[key].A, after.A, factor), _toward(start[key].B, after.B, factor))
        for key, after in trained.items()
    })  # fmt: skip


def noised(state: AdapterState, deviation: float, generator: torch.Generator, frozen_A: bool) -> AdapterState:
    """Factors with N(0, deviation^2) on every number; not on A where the rule never trains it."""

    def noisy(tensor: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
        return tensor + (deviation * drawn).to(device=tensor.device, dtype=tensor.dtype)

    factors: dict[Key, Factors] = {}
    for key, value in state.items():
        factors[key] = Factors(value.A if frozen_A else noisy(value.A), noisy(value.B))
    return AdapterState(factors)


def noise_deviation(clip_norm: float, noise_multiplier: float, participants: int) -> float:
    """Standard deviation of the noise on the mean of so many updates."""
    return clip_norm * noise_multiplier / participants


def _toward(start: torch.Tensor, end: torch.Tensor, factor: float) -> torch.Tensor:
    return start + (end - start) * factor
