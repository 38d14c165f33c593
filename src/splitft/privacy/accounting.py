"""Compute the epsilon of noise at a given delta: pure arithmetic, with the duals of opacus.

    one Gaussian mechanism of sensitivity 1 and deviation sigma         mu = 1 / sigma
    composed T times, each time on the same person's data               mu = sqrt(T) / sigma    (exactly)
    mu-GDP -> (epsilon, delta)           delta(eps) = Phi(-eps/mu + mu/2) - e^eps Phi(-eps/mu - mu/2)

Gaussian differential privacy composes without loss (Dong et al. 2019, arXiv 1905.02383, Cor. 3.3). Without
subsampling this is therefore tighter than a Renyi accountant, and as tight as possible. No amplification by
subsampling is claimed: the server, and in simulation everyone, knows who takes part in a round.
"""

from __future__ import annotations

import math
from typing import Any

from splitft.errors import ConfigError


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return epsilon of mu-GDP at `delta`: infinite without noise, 0 if nothing is revealed.

    Above epsilon 500, where the dual overflows, return the looser mu^2 / 2 + mu sqrt(2 ln(1 / delta)) of
    Renyi divergence (Mironov 2017, arXiv 1702.07476). Such an epsilon is no protection in any case.
    """
    if mu <= 0 or math.isinf(mu):
        return 0.0 if mu <= 0 else math.inf
    gdp = _opacus()
    if gdp.delta_eps_mu(eps=0.0, mu=mu) <= delta:
        return 0.0
    if gdp.delta_eps_mu(eps=500.0, mu=mu) < delta:
        return float(gdp.eps_from_mu(mu=mu, delta=delta))
    return mu**2 / 2 + mu * math.sqrt(2 * math.log(1 / delta))


def updates_epsilon(noise_multiplier: float, rounds: int, delta: float) -> float:
    """Return epsilon of `rounds` noisy aggregations, for a client that took part in all of them."""
    return gaussian_epsilon(math.sqrt(rounds) / noise_multiplier if noise_multiplier else math.inf, delta)


def row_epsilon(defence: str, noise: float, width: int, delta: float, rows: int = 1) -> float:
    """Return the local epsilon of `rows` rows treated by a defence of `noise.DEFENCES`, composed.

    For a whole text, `rows` is its number of tokens times the passes over it.
    """
    if defence not in ("gaussian", "laplace") or noise == 0:
        return math.inf
    if defence == "gaussian":
        return gaussian_epsilon(math.sqrt(rows) * 2 * math.sqrt(width) / noise, delta)
    return rows * 2 * math.sqrt(width * (width + 1)) / noise  # 2 C rate, added up: pure epsilon, delta 0


def accountant_missing() -> str | None:
    """Return how to install the accountant, or None if it is installed."""
    from importlib.util import find_spec

    if find_spec("opacus") is None:
        return "the accounting of noise needs opacus: pip install 'splitft[privacy]'"
    return None


def _opacus() -> Any:
    if missing := accountant_missing():
        raise ConfigError(missing)
    from opacus.accountants.analysis import gdp

    return gdp
