"""Statistics of the shares: examples, tokens, lengths and labels by client, and one number for all.

The histogram's bins are quantiles of all lengths, so that the bars of an IID share are about equally high
and a client that has only long text stands out. The one number is the mean, over pairs of clients,
of the Jensen-Shannon distance of their histograms (base 2: 0 for equal shapes, 1 for disjoint ones;
Endres and Schindelin 2003, https://doi.org/10.1109/TIT.2003.813506). Small shares are never quite alike:
twenty examples a client give about 0.35 even when drawn at random. `chance_distance` is therefore the same
number for shares of the same sizes whose examples are drawn at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from splitft.data.partitions import Shares, label_classes, length_classes, values_of
from splitft.data.text import Example, Indices
from splitft.seeds import Draw

CHANCE = 8
"""Random divisions that `chance_distance` is the mean of."""


@dataclass(frozen=True)
class ShareSummary:
    """Sizes, lengths and labels of every client's share, as plain numbers."""

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
    chance_distance: float
    """The same, on average, for shares of these sizes drawn at random."""
    quartiles: tuple[tuple[int, int, int, int, int], ...]
    """For each client its shortest example, the three quartiles and the longest, in tokens."""
    labels: tuple[str, ...] = ()
    """The labels of the examples, if they carry any."""
    label_counts: tuple[tuple[int, ...], ...] = ()
    """For each client, its examples of each label."""
    label_distance: float | None = None
    """Mean pairwise Jensen-Shannon distance of the label counts; None without labels."""


def summarise_shares(examples: Sequence[Example], shares: Shares, bins: int = 8) -> ShareSummary:
    """Count each client's examples, with length histograms of at most `bins` quantile bins."""
    lengths = np.array([len(example) for example in examples])
    _, classes = np.unique(length_classes(examples, bins), return_inverse=True)  # without empty bins
    count = int(classes.max()) + 1
    parts = [np.array(share, dtype=np.int64) for share in shares]
    histograms = _counts(classes, parts, count)
    labels = values_of(examples) if all(example.label is not None for example in examples) else ()
    label_counts = _counts(label_classes(examples), parts, len(labels)) if labels else None
    return ShareSummary(
        examples=tuple(len(part) for part in parts),
        tokens=tuple(int(lengths[part].sum()) for part in parts),
        bins=tuple(
            (int(lengths[classes == one].min()), int(lengths[classes == one].max())) for one in range(count)
        ),
        histograms=tuple(tuple(row) for row in histograms.tolist()),
        length_distance=mean_distance(histograms),
        chance_distance=_chance_distance(classes, [len(part) for part in parts], count),
        quartiles=tuple(_quartiles(lengths[part]) for part in parts),
        labels=labels,
        label_counts=() if label_counts is None else tuple(tuple(row) for row in label_counts.tolist()),
        label_distance=None if label_counts is None else mean_distance(label_counts),
    )


def _counts(classes: Indices, parts: Sequence[Indices], count: int) -> Indices:
    """Count the examples of each class with each client: (N, K)."""
    return np.array([np.bincount(classes[part], minlength=count) for part in parts])


def _chance_distance(classes: Indices, sizes: Sequence[int], count: int) -> float:
    """Return the mean distance of shares of these sizes drawn at random; the draws are fixed."""
    ends = np.cumsum(sizes)[:-1]
    draws = (Draw.CHANCE.generator(draw) for draw in range(CHANCE))
    parts = [np.split(one.permutation(len(classes))[: sum(sizes)], ends) for one in draws]
    return sum(mean_distance(_counts(classes, part, count)) for part in parts) / CHANCE


def _quartiles(lengths: Indices) -> tuple[int, int, int, int, int]:
    """Return shortest, quartiles and longest, each the nearest length that occurs."""
    low, first, middle, third, high = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1], method="nearest").tolist()
    return low, first, middle, third, high


def mean_distance(histograms: NDArray[np.int64]) -> float:
    """Return the mean Jensen-Shannon distance over all pairs of rows of (N, K) counts; no row may be zero.

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
    """Return the entropy (N,) in bits of each row of probabilities (N, K)."""
    logs = np.log2(shapes, out=np.zeros_like(shapes), where=shapes > 0)
    entropies: NDArray[np.float64] = -(shapes * logs).sum(axis=1)
    return entropies
