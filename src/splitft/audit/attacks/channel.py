"""What the attacker knows of the way from a client's hidden states to the bytes, and how to judge a match.

    h (true) --clip--> --noise of deviation s--> --codec--> o (observed)

Clipping and codecs are settings of the run, so the attacker does the same to its candidates. Noise it cannot
repeat, but it knows its size. So the log-likelihood of a candidate's hidden state g after that way is

    -1/2 sum_j (o_j - g_j)^2 / v_j        v_j = s^2 + rounding^2 (o_j^2 + floor^2 mean(o^2))

and the misfit, its mean over the D coordinates of (o - g)^2 / v, is about 1 or less for the right token. That
is what tells the attacker whether to look further, with noise and without. `rounding` is how far the same
hidden state is off when it is computed in another batch: the attacker measures it on public text
(`calibrated`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

FLOOR = 0.5
"""A coordinate is off by at least the rounding of one of half the typical size."""
SAFETY = 2.0
"""The measured rounding is taken so many times, for the spread between tokens."""
LEAST_ROUNDING = 1e-5


@dataclass(frozen=True)
class ObservationModel:
    """The known part of what happens to a row before it is seen."""

    rounding: float = 2**-6
    """Relative error of a coordinate between two computations."""
    deviation: float = 0.0
    """s, the standard deviation of the noise on one coordinate."""
    repeated: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows
    """Clipping and codec, (N, D) -> (N, D) as the server would decode it."""

    def variance(self, observed: torch.Tensor) -> torch.Tensor:
        """v, of the shape of `observed` (..., D)."""
        return self.deviation**2 + self.rounding**2 * _size(observed) + 1e-12

    def misfit(self, observed: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """(R, D) observed, (R, C, D) candidates' hidden states -> (R, C)."""
        sent = self.repeated(candidates.flatten(0, -2)).view_as(candidates)
        wide = observed[:, None]
        return ((wide - sent).square() / self.variance(wide)).mean(-1)

    def fits(self, misfit: torch.Tensor, width: int) -> torch.Tensor:
        """Whether a misfit is that of the right token: six standard deviations of noise above its mean."""
        return misfit <= 1 + 6 * math.sqrt(2 / width)


def calibrated(channel: ObservationModel, together: torch.Tensor, apart: torch.Tensor) -> ObservationModel:
    """With the rounding found between two computations (N, D) of the same public hidden states."""
    one, other = channel.repeated(together), channel.repeated(apart)
    off = float(((one - other).square() / _size(one)).mean().sqrt())
    return replace(channel, rounding=max(SAFETY * off, LEAST_ROUNDING))


def _size(rows: torch.Tensor) -> torch.Tensor:
    return rows.square() + FLOOR**2 * rows.square().mean(-1, keepdim=True)
