"""Bound what one client can change in a round and add noise to the mean: DP-FedAvg on adapters.

    start_i     the factors client i began the round with       (public: from global factors and its cut)
    update_i    its factors after the round - start_i           over all L blocks, wherever they were trained
    clipped_i   update_i * min(1, C / ||update_i||)             L2 over all factors together
    global    = mean_i(start_i + clipped_i) + N(0, (sigma C / n)^2) on every factor that is trained

McMahan et al. 2018, arXiv 1710.06963, with the server adding the noise. All n participants have equal weight:
weights by tokens would reveal how much text a client has, and let one client move the mean further.

The guarantee is against whoever receives the global adapters of all rounds: other clients, and users of the
export. At (epsilon, delta) they cannot tell whether one client's updates were replaced by zeros (zero-out
neighbours: Kairouz et al. 2021, arXiv 2103.00039), since the mean then moves by at most C / n. If a client's
text is replaced by any other, the mean moves by up to 2 C / n: double `mu` for that. Rounds compose, see
`accounting`: every client is counted as a participant of every round so far, which is exact at full
participation and an upper bound below it.

Nothing is hidden from the server, which sees each update and, in split learning, the hidden states and
gradients as well. Noise that each client adds to its own upload would not help there: the server itself
trains the blocks after the cut for it. The bound needs a rule that averages factors (`Rule.bounded`). The
mean of products (svd) has no such bound: a factor moved by C moves its product by C times the size of the
other factor. Readers of a run's events also see exact losses.
"""

from __future__ import annotations

import math

import torch

from splitft.adapters import AdapterState
from splitft.adapters.state import Factors, Key
from splitft.privacy.accounting import updates_epsilon
from splitft.privacy.noise import Noise
from splitft.specs import PrivacySpec
from splitft.specs.rules import RULES
from splitft.tracking.events import PrivacySpent


class UpdateBounds:
    """Clipping and noise of a run's updates, on the server; without `clip_norm` it changes nothing."""

    def __init__(self, privacy: PrivacySpec, rule: str, noise: Noise) -> None:
        self._spec, self._delta = privacy.updates, privacy.delta
        self._frozen_A = "A" not in RULES[rule].trains
        self._noise = noise
        self._clipped, self._deviation = 0, 0.0  # of the current round

    @property
    def bounding(self) -> bool:
        """True if updates are clipped."""
        return self._spec.clip_norm is not None

    def weight(self, tokens: int) -> float:
        """Return a participant's weight in the mean: 1 with noise, else its trained tokens."""
        return 1.0 if self._spec.noise_multiplier else float(tokens)

    def clipped(self, start: AdapterState, trained: AdapterState) -> AdapterState:
        """Clip a participant's update to the bound, and count it if it was longer."""
        norm = self._spec.clip_norm
        if norm is None:
            return trained
        self._clipped += update_norm(start, trained) > norm
        return clip_update(start, trained, norm)

    def noised(self, mean: AdapterState, participants: int, number: int) -> AdapterState:
        """Add the noise of round `number` to the mean of its updates."""
        spec = self._spec
        if not spec.noise_multiplier or spec.clip_norm is None:
            return mean
        self._deviation = noise_deviation(spec.clip_norm, spec.noise_multiplier, participants)
        return add_noise(mean, self._deviation, self._noise.generator("updates", number), self._frozen_A)

    def spent(self, number: int) -> PrivacySpent | None:
        """Return the epsilon of round `number` and of all rounds up to it; None without a bound."""
        if not self.bounding:
            return None
        clipped, self._clipped = self._clipped, 0
        multiplier, delta = self._spec.noise_multiplier, self._delta
        return PrivacySpent(
            round=number,
            epsilon=updates_epsilon(multiplier, number, delta),
            epsilon_of_round=updates_epsilon(multiplier, 1, delta),
            delta=delta,
            clipped=clipped,
            deviation=self._deviation,
        )


def update_norm(start: AdapterState, trained: AdapterState) -> float:
    """Return the L2 norm of the change of all factors together; infinite if a number is not finite."""
    total = 0.0
    for key, after in trained.items():
        before = start[key]
        for new, old in ((after.A, before.A), (after.B, before.B)):
            total += float((new.double() - old.double()).square().sum())
    return math.sqrt(total) if math.isfinite(total) else math.inf


def clip_update(start: AdapterState, trained: AdapterState, clip_norm: float) -> AdapterState:
    """Move `trained` to within `clip_norm` of `start`; drop an update that is not finite."""
    norm = update_norm(start, trained)
    if norm <= clip_norm:
        return trained
    factor = clip_norm / norm
    if factor == 0:
        return AdapterState({key: start[key] for key in trained})

    def toward(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return before + (after - before) * factor

    return AdapterState({
        key: Factors(toward(start[key].A, after.A), toward(start[key].B, after.B))
        for key, after in trained.items()
    })  # fmt: skip


def add_noise(
    state: AdapterState, deviation: float, generator: torch.Generator, frozen_A: bool
) -> AdapterState:
    """Add N(0, deviation^2) to every number of the factors; not to A if the rule never trains it."""

    def noisy(tensor: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
        return tensor + (deviation * drawn).to(device=tensor.device, dtype=tensor.dtype)

    factors: dict[Key, Factors] = {}
    for key, value in state.items():
        factors[key] = Factors(value.A if frozen_A else noisy(value.A), noisy(value.B))
    return AdapterState(factors)


def noise_deviation(clip_norm: float, noise_multiplier: float, participants: int) -> float:
    """Return the standard deviation of the noise on the mean of so many updates."""
    return clip_norm * noise_multiplier / participants
