"""Model how a client's hidden states become the observed ones, to judge whether a candidate fits.

    h (true) --clip--> --noise of deviation s--> --codec--> o (observed)

Clipping and codecs are settings of the run, so the attacker applies the same to its candidates. It cannot
repeat the noise, but knows its size. So the log-likelihood of a candidate's hidden state g after these steps
is

    -1/2 sum_j (o_j - g_j)^2 / v_j        v_j = s^2 + rounding^2 (o_j^2 + floor^2 mean(o^2))

The misfit, the mean over the D coordinates of (o - g)^2 / v, is about 1 or less for the right token, with
noise and without. It tells the attacker whether to search further. `rounding` is the relative difference
between two computations of the same hidden state in different batches, which the attacker measures on public
text (`calibrated`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

FLOOR = 0.5
"""A coordinate has at least the rounding error of one of half the typical size."""
SAFETY = 2.0
"""Factor on the measured rounding, for the spread between tokens."""
LEAST_ROUNDING = 1e-5


@dataclass(frozen=True)
class ObservationModel:
    """The known part of what happens to a row of hidden states before it is observed."""

    rounding: float = 2**-6
    """Relative error of a coordinate between two computations."""
    deviation: float = 0.0
    """s, the standard deviation of the noise on one coordinate."""
    without_noise: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows
    """Clipping and codec, (N, D) -> (N, D) as the server would decode it."""

    def variance(self, observed: torch.Tensor) -> torch.Tensor:
        """Return v, of the shape of `observed` (..., D)."""
        return self.deviation**2 + self.rounding**2 * _size(observed) + 1e-12

    def misfit(self, observed: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Compare observed rows (R, D) with candidates' hidden states (R, C, D) -> (R, C)."""
        sent = self.without_noise(candidates.flatten(0, -2)).view_as(candidates)
        rows = observed[:, None]
        return ((rows - sent).square() / self.variance(rows)).mean(-1)

    def fits(self, misfit: torch.Tensor, width: int) -> torch.Tensor:
        """Return where a misfit is below its mean for the right token plus six standard deviations."""
        return misfit <= 1 + 6 * math.sqrt(2 / width)


def calibrated(model: ObservationModel, one: torch.Tensor, other: torch.Tensor) -> ObservationModel:
    """Set the rounding to that between two computations (N, D) of the same public hidden states."""
    one, other = model.without_noise(one), model.without_noise(other)
    error = float(((one - other).square() / _size(one)).mean().sqrt())
    return replace(model, rounding=max(SAFETY * error, LEAST_ROUNDING))


def _size(rows: torch.Tensor) -> torch.Tensor:
    return rows.square() + FLOOR**2 * rows.square().mean(-1, keepdim=True)
