"""Add noise to a client's held-out loss, so that it reveals no more of a label than one returning gradient.

    labels (M,) of all held-out batches --loss of each, at most C nats--> sum --noise--> Evaluation.loss

An exact sum reveals labels: a single label can be read off its own loss. If each loss is in [0, C], another
label changes the sum by at most C. The noise gives each evaluation the privacy that one pass over a label has
by the run's other settings:

    privacy.labels randomised    Laplace noise of scale C / epsilon                      pure epsilon-DP
    privacy.gradient laplace     the same, with the epsilon of one row of gradients      pure epsilon-DP
    privacy.gradient gaussian    Gaussian noise of deviation C / mu, mu = 2 sqrt(D) / noise        mu-GDP

With both sections set, that of `privacy.labels` counts. The sum is over all held-out labels of a client, so
its mean hardly changes: at noise 8 and width 576 the deviation is 3 nats, 0.003 nats a label of 1,000.

Training losses have no noise because none are sent while labels are protected: a batch has few labels, and
nothing in training needs its loss. Laplace mechanism: Dwork et al. 2006, doi 10.1007/11681878_14.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from splitft.privacy.accounting import gaussian_epsilon, row_epsilon
from splitft.specs import PrivacySpec

MOST_NATS = 20.0
"""C: a higher loss of one label counts as this; the model gives such a label less than e^-20."""


@dataclass(frozen=True)
class HeldOutNoise:
    """Noise on the sum of one client's held-out losses, drawn anew for each evaluation."""

    kind: Literal["gaussian", "laplace"]
    ratio: float
    """C over the noise's scale: mu of Gaussian noise, epsilon of Laplace noise, for one label."""

    @property
    def deviation(self) -> float:
        """Standard deviation, in nats."""
        return MOST_NATS / self.ratio * (1.0 if self.kind == "gaussian" else math.sqrt(2))

    def add(self, total: float, generator: torch.Generator) -> float:
        """Return the sum with noise."""
        if self.kind == "gaussian":
            drawn = float(torch.randn((), generator=generator, dtype=torch.float64))
        else:  # the difference of two exponentials; 1 - rand is in (0, 1], where the logarithm is finite
            one, other = (-torch.log(1 - torch.rand(2, generator=generator, dtype=torch.float64))).tolist()
            drawn = one - other
        return total + MOST_NATS / self.ratio * drawn

    def epsilon(self, evaluations: int, delta: float) -> float:
        """Return epsilon of one label over this number of evaluations; pure (delta 0) for Laplace noise."""
        if self.kind == "gaussian":
            return gaussian_epsilon(math.sqrt(evaluations) * self.ratio, delta)
        return evaluations * self.ratio


def held_out_noise(privacy: PrivacySpec, width: int) -> HeldOutNoise | None:
    """Return the noise on held-out losses; None if labels are not protected and losses are sent exactly."""
    if privacy.labels.defence != "none":
        return HeldOutNoise("laplace", privacy.labels.epsilon)
    gradient = privacy.gradient
    if gradient.defence == "laplace":
        return HeldOutNoise("laplace", row_epsilon("laplace", gradient.noise, width, privacy.delta))
    if gradient.defence == "gaussian":
        return HeldOutNoise("gaussian", 2 * math.sqrt(width) / gradient.noise)
    return None


def bounded_sum(losses: torch.Tensor) -> float:
    """Return the sum of losses (M,), each at most C."""
    return float(losses.double().clamp(max=MOST_NATS).sum())
