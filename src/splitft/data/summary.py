"""Say how unequal the shares are: examples, tokens and lengths of each client, and one number for all.

The histogram's bins are quantiles of all lengths, so that every bar of an IID share is about equally high
and a client that has only long text is seen at once. The one number is the mean, over pairs of clients,
of the Jensen-Shannon distance of their histograms (base 2: 0 for equal shapes, 1 for disjoint ones;
Endres and Schindelin 2003, https://doi.org/10.1109/TIT.2003.813506). Small shares are never quite alike:
twenty examples a client give about 0.35 even when drawn at random, so compare with `iid` at the same sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splitft.data.shares import Shares, length_classes
from splitft.data.text import Example


@dataclass(frozen=True)
class ShareSummary:
    """Who got how much of what, as plain numbers."""

    examples: tuple[int, ...]
    """Examples of each client."""
    tokens: tuple[int, ...]
    """Tokens of each client."""
    bins: tuple[tuple[int, int], ...]
    """Shortest and longest example, in tokens, of each bin of the histograms."""
    histograms: tuple[tuple[int, ...], ...]
    """For each client, its examples in each bin."""
    length_distance: float
    """Mean pairwise Jensen-Shannon distance of the histograms, 0 to 1; 0 for one client."""


def summarise_shares(examples: Sequence[Example], shares: Shares, bins: int = 8) -> ShareSummary:
    """Count what each client got, with length histograms of at most `bins` quantile bins."""
    lengths = np.array([len(example) for example in examples])
    _, classes = np.unique(length_classes(examples, bins), return_inverse=True)  # without empty bins
    count = int(classes.max()) + 1
    parts = [np.array(share, dtype=np.int64) for share in shares]
    histograms = np.array([np.bincount(classes[part], minlength=count) for part in parts])
    return ShareSummary(
        examples=tuple(len(part) for part in parts),
        tokens=tuple(int(lengths[part].sum()) for part in parts),
        bins=tuple(
            (int(lengths[classes == one].min()), int(lengths[classes == one].max())) for one in range(count)
        ),
        histograms=tuple(tuple(row) for row in histograms.tolist()),
        length_distance=mean_distance(histograms),
    )


def mean_distance(histograms: NDArray[np.int64]) -> float:
    """Mean Jensen-Shannon distance over all pairs of rows of (N, K) counts; no row may be all zero.

    JSD(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2 with entropies H in bits; the distance is its root.
    """
    clients = len(histograms)
    if clients < 2:
        return 0.0
    shapes = histograms / histograms.sum(axis=1, keepdims=True)
    own = _entropy(shapes)  # (N,)
    total = 0.0
    for i in range(clients - 1):
        divergence = _entropy((shapes[i] + shapes[i + 1 :]) / 2) - (own[i] + own[i + 1 :]) / 2
        total += float(np.sqrt(np.clip(divergence, 0, 1)).sum())  # rounding may leave -1e-17
    return total / (clients * (clients - 1) / 2)


def _entropy(shapes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Entropy (N,) in bits of each row of probabilities (N, K)."""
    logs = np.log2(shapes, out=np.zeros_like(shapes), where=shapes > 0)
    entropies: NDArray[np.float64] = -(shapes * logs).sum(axis=1)
    return entropies
