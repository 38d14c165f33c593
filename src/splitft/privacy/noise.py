"""Clip rows and add noise to them, as the last step before a tensor leaves a client.

    rows (N, D) --clip to norm C--> ||row|| <= C --noise of std s per coordinate--> what the server sees

    s = noise * C / sqrt(D)        so `noise` is the noise over the largest root mean square of a clipped row

`noise: 1` therefore adds as much noise as a row can have signal, at every cut and for every model, although
hidden states of deep blocks are a hundred times larger than those of shallow ones.

The guarantee of each, for ONE ROW and its replacement by any other row (both clipped, so at most 2 C apart):

    none, clip   nothing
    gaussian     local (epsilon, delta)-DP, as a Gaussian mechanism of sensitivity 2 C; mu = 2 C / s
                 (mu-GDP: Dong et al. 2019, arXiv 1905.02383)
    laplace      noise of density ~ exp(-rate ||x||): local epsilon-DP with epsilon = 2 C rate, and, finer,
                 metric privacy: two rows at distance d are (rate d)-indistinguishable (d_X privacy:
                 Chatzikokolakis et al. 2013; on embeddings: Feyisetan et al. 2020, arXiv 1910.08902). Metric
                 privacy is NOT DP: it protects near rows from each other and promises little for far ones.

A row is not a word. A row of a causal model depends on all tokens before it, and the same text is sent once
an epoch, so replacing one token of a text of T may replace T rows each time: `accounting` composes them. The
guarantee covers this tensor only: docs/what-a-split-hides.md lists everything that is sent beside it.

Not offered: a secret rotation of the hidden states. A rotated h Q passes a norm only if the norm's weight
is folded into the next linear layer W, and then the server must compute with W Q. It knows the public W, so
it can compute Q = pinv(W) (W Q); a server that cannot know Q cannot compute with W Q either. LayerNorm
subtracts a mean and does not commute with a rotation at all. Besides, Q keeps all inner products of rows,
which already reveal which tokens repeat.

Codecs are a weak defence too; they are chosen in `wire` (the audit measures both). The noise is pseudo-random
floats: nothing is guaranteed against an adversary who reads the last bits of a float (Mironov 2012), which
rounding by the codec makes harder, or who knows the generator's state.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Callable

import torch

Defender = Callable[[torch.Tensor, float, float, torch.Generator], torch.Tensor]
"""(rows (N, D), clip_norm, noise, generator) -> rows, differentiable in the rows."""


def unchanged(rows: torch.Tensor, clip_norm: float, noise: float, generator: torch.Generator) -> torch.Tensor:
    """Return the rows as they are. No guarantee."""
    return rows


def clip(rows: torch.Tensor, clip_norm: float, noise: float, generator: torch.Generator) -> torch.Tensor:
    """Scale rows longer than `clip_norm` down to it. No guarantee by itself; noise needs it."""
    wide = rows.to(_float_type(rows))
    norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide * torch.clamp(clip_norm / norms.clamp_min(1e-30), max=1.0)).to(rows.dtype)


def gaussian(rows: torch.Tensor, clip_norm: float, noise: float, generator: torch.Generator) -> torch.Tensor:
    """Clip, then add N(0, s^2) to every coordinate: local (epsilon, delta)-DP, mu = 2 sqrt(D) / noise."""
    drawn = torch.randn(rows.shape, generator=generator, dtype=torch.float32)
    return _add(rows, clip_norm, drawn * deviation(clip_norm, noise, rows.shape[-1]))


def laplace(rows: torch.Tensor, clip_norm: float, noise: float, generator: torch.Generator) -> torch.Tensor:
    """Clip, then add noise of density ~ exp(-rate ||x||): epsilon-DP and metric privacy for a row.

    The noise has a random direction and a radius of Gamma(D, rate), the sum of D exponentials. Its variance
    per coordinate is (D + 1) / rate^2, which is s^2.
    """
    width = rows.shape[-1]
    direction = torch.randn(rows.shape, generator=generator, dtype=torch.float32)
    direction = direction / torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    # 1 - rand is in (0, 1], where the logarithm is finite
    exponentials = -torch.log(1 - torch.rand(rows.shape, generator=generator, dtype=torch.float64))
    radius = exponentials.sum(-1, keepdim=True) / laplace_rate(clip_norm, noise, width)
    return _add(rows, clip_norm, direction * radius)


DEFENCES: dict[str, Defender] = {
    "none": unchanged,
    "clip": clip,
    "gaussian": gaussian,
    "laplace": laplace,
}
"""All defences of rows, by the name in `privacy.hidden` and `privacy.gradient`."""


def deviation(clip_norm: float, noise: float, width: int) -> float:
    """Return s, the standard deviation of the noise on one coordinate."""
    return noise * clip_norm / math.sqrt(width)


def laplace_rate(clip_norm: float, noise: float, width: int) -> float:
    """Return the rate of `laplace`, per unit of distance: epsilon of metric privacy."""
    return math.sqrt(width + 1) / deviation(clip_norm, noise, width)


def typical_norm(rows: torch.Tensor) -> float:
    """Return the median norm of rows: a clipping norm, if the rows are public."""
    return float(torch.linalg.vector_norm(rows.to(_float_type(rows)), dim=-1).median())


class Noise:
    """Source of a client's random generators.

    In simulation they are functions of seed, client and place, so that a run can be repeated and resumed
    exactly. A deployment must pass `secret=True`: whoever knows the seed could subtract the noise.
    """

    def __init__(self, seed: int, client: str, secret: bool = False) -> None:
        self._seed, self._client, self._secret = seed, client, secret

    def generator(self, *place: object) -> torch.Generator:
        """Return the generator of one place, such as purpose, round and step."""
        if self._secret:
            return torch.Generator().manual_seed(secrets.randbits(63))
        words = "/".join(map(str, ("noise", self._seed, self._client, *place))).encode()
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(words).digest()[:7]))


def _add(rows: torch.Tensor, clip_norm: float, noise: torch.Tensor) -> torch.Tensor:
    """Clip rows and add noise in float32 at least, then round to the type of the rows."""
    wide = rows.to(_float_type(rows))
    clipped = clip(wide, clip_norm, 0.0, torch.Generator())
    return (clipped + noise.to(device=wide.device, dtype=wide.dtype)).to(rows.dtype)


def _float_type(rows: torch.Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)
