"""The server's part in DP-FedAvg: each update clipped, the mean noised, the promise accounted.

    start_i, trained_i --clipped--> set_i --aggregate (equal weights)--> mean --noised--> global, PrivacySpent

What is promised, to whom and to whom not, is told in `updates`. Epsilon counts every client as a participant
of every round so far: exact at full participation, an upper bound below it.
"""

from __future__ import annotations

from splitft.adapters import AdapterState
from splitft.privacy.accounting import updates_epsilon
from splitft.privacy.dp_fedavg import clipped, noise_deviation, noised, update_norm
from splitft.privacy.noise import Noise
from splitft.specs import PrivacySpec
from splitft.tracking.events import PrivacySpent


class UpdateBounds:
    """Bounds and noise on the updates of a run; without `clip_norm` it changes nothing."""

    def __init__(self, privacy: PrivacySpec, rule: str, noise: Noise) -> None:
        self._updates, self._delta = privacy.updates, privacy.delta
        self._frozen_A = rule == "ffa"
        self._noise = noise
        self._clipped, self._deviation = 0, 0.0

    @property
    def bounding(self) -> bool:
        """Whether it changes anything."""
        return self._updates.clip_norm is not None

    def weight(self, tokens: int) -> float:
        """How much a participant counts: all alike under noise, else by the tokens it has trained on."""
        return 1.0 if self._updates.noise_multiplier else float(tokens)

    def clipped(self, start: AdapterState, trained: AdapterState) -> AdapterState:
        """A participant's factors, no further from where it began than the bound."""
        norm = self._updates.clip_norm
        if norm is None:
            return trained
        self._clipped += update_norm(start, trained) > norm
        return clipped(start, trained, norm)

    def noised(self, mean: AdapterState, participants: int, number: int) -> AdapterState:
        """The mean of a round's updates as it may be handed out."""
        spec = self._updates
        if not spec.noise_multiplier or spec.clip_norm is None:
            return mean
        self._deviation = noise_deviation(spec.clip_norm, spec.noise_multiplier, participants)
        return noised(mean, self._deviation, self._noise.generator("updates", number), self._frozen_A)

    def spent(self, number: int) -> PrivacySpent | None:
        """What the round just noised has cost, and all before it; None if updates are not bounded."""
        spec = self._updates
        if spec.clip_norm is None:
            return None
        clipped, self._clipped = self._clipped, 0
        total, one = (updates_epsilon(spec.noise_multiplier, rounds, self._delta) for rounds in (number, 1))
        return PrivacySpent(
            round=number,
            epsilon=total,
            epsilon_of_round=one,
            delta=self._delta,
            clipped=clipped,
            deviation=self._deviation,
        )
