"""Aggregation rules that withstand hostile members (`splitft.specs.rules`).

    median, trimmed-mean   each number by itself: Yin et al. 2018, https://arxiv.org/abs/1803.01498
    krum                   whole members: Blanchard et al. 2017, https://arxiv.org/abs/1703.02757 (multi-Krum)

Members of a layer have equal weights. If they have one rank, and so the same axes, the numbers are those of A
and B: each number of the result is within the range of the honest members' numbers. If ranks differ, a row of
A means something else in each member, so the numbers are those of the products B A (out, in), each within the
range of the honest products'. The result is then the best approximation of that matrix at the wanted rank:
no longer than the matrix, but its single numbers may leave the range.

The matrix of medians has no thin factors, so it is computed a few rows at a time, and its leading directions
by subspace iteration that begins at the members' own rows (Halko et al. 2011, arXiv 0909.4061).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from splitft.adapters.aggregators import Fresh, United, average_factors
from splitft.adapters.factoring import A_ROW_NORM, in_frame, stacked
from splitft.adapters.members import Weighted
from splitft.adapters.state import AdapterState, Factors, Key

PASSES = 3
"""Rounds of subspace iteration."""
LONGEST_ROW = 8 * A_ROW_NORM
"""Longest row of A that a frame follows; LoRA begins with rows of `A_ROW_NORM`."""
Combine = Callable[[torch.Tensor], torch.Tensor]
"""Numbers of n members (n, ...) -> one number in place of each n."""


def coordinate_median(key: Key, members: Weighted, rank: int, fresh: Fresh) -> United:
    """Take the median of each number; of two in the middle, their mean. Withstands (n - 1) // 2 of n."""
    return United(_combined(members, rank, _median))


def trimmed_mean(key: Key, members: Weighted, rank: int, fresh: Fresh, hostile: int) -> United:
    """Take the mean of each number without the `hostile` largest and smallest. Withstands `hostile`."""

    def trimmed(numbers: torch.Tensor) -> torch.Tensor:
        return numbers.sort(0).values[hostile : len(numbers) - hostile].mean(0)

    return United(_combined(members, rank, trimmed))


def mean_of_selected(key: Key, members: Weighted, rank: int, fresh: Fresh) -> United:
    """Average the members that `nearest_members` has selected: their factors, or products if ranks differ."""
    if _one_rank(members):
        return average_factors(key, members, rank, fresh)
    return United(in_frame(stacked_as(members), rank, _median_rows(members, rank)))


def nearest_members(
    members: Sequence[tuple[float, AdapterState]], hostile: int
) -> list[tuple[float, AdapterState]]:
    """Select the n - f members with the smallest sums of squared distances to their n - f - 2 nearest.

    Distances are over all layers. Withstands f = `hostile` of n members if n is at least 2 f + 3. The mean of
    those that are selected is nearer to the honest members than these are to each other, up to a factor that
    depends on n and f alone (proposition 4.2): a hostile member is selected only if it is that near.
    """
    if not hostile:
        return list(members)
    count = len(members)
    squared = torch.zeros(count, count, dtype=torch.float64)
    for key in members[0][1]:
        squared += _squared_distances([state[key] for _, state in members])
    squared.fill_diagonal_(math.inf)
    scores = squared.sort(1).values[:, : count - hostile - 2].sum(1)
    chosen = scores.argsort(stable=True)[: count - hostile]
    return [members[index] for index in sorted(chosen.tolist())]


def stacked_as(members: Weighted) -> Factors:
    """Return factors of sum w_i B_i A_i at the rank sum, in the members' own dtype, with their magnitudes."""
    dtype, whole = members[0][1].A.dtype, stacked(members)
    terms = [weight * factors.magnitude for weight, factors in members if factors.magnitude is not None]
    magnitude = torch.stack(terms).sum(0) if terms else None
    return Factors(whole.A.to(dtype), whole.B.to(dtype), magnitude)


def _combined(members: Weighted, rank: int, combine: Combine) -> Factors:
    """Combine the members' numbers: of A and B if all have one rank, else of their products."""
    layers = [factors for _, factors in members]
    magnitudes = [factors.magnitude for factors in layers if factors.magnitude is not None]
    magnitude = combine(torch.stack(magnitudes)) if magnitudes else None
    if _one_rank(members):
        A, B = (
            combine(torch.stack([one.A for one in layers])),
            combine(torch.stack([one.B for one in layers])),
        )
        return Factors(A, B, magnitude)
    return in_frame(_leading(layers, combine, magnitude), rank, _median_rows(members, rank))


def _leading(layers: Sequence[Factors], combine: Combine, magnitude: torch.Tensor | None) -> Factors:
    """Return factors of the combined products' leading directions, at most as many as all ranks together."""
    first, most = layers[0], sum(one.rank for one in layers)
    rows = torch.cat([one.A.double() for one in layers])
    right = torch.linalg.qr((rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300)).T).Q  # (in, most)
    for _ in range(PASSES):
        image = torch.cat([part @ right for part in _products(layers, combine)])  # (out, most)
        left = torch.linalg.qr(image).Q
        back, start = torch.zeros_like(right[:, : left.shape[1]]), 0
        for part in _products(layers, combine):
            back += part.T @ left[start : start + len(part)]
            start += len(part)
        right = torch.linalg.qr(back).Q
    image = torch.cat([part @ right for part in _products(layers, combine)])
    return Factors(right.T[:most].to(first.A.dtype), image[:, :most].to(first.A.dtype), magnitude)


def _products(layers: Sequence[Factors], combine: Combine) -> Iterator[torch.Tensor]:
    """Return the combined products B A, a few rows (rows, in) at a time: no more numbers than the factors."""
    rows = max(1, sum(one.rank for one in layers) // len(layers))
    for start in range(0, layers[0].B.shape[0], rows):
        part = [one.B[start : start + rows].double() @ one.A.double() for one in layers]
        yield combine(torch.stack(part))


def _median(numbers: torch.Tensor) -> torch.Tensor:
    """Return the median over the first axis; of two in the middle, their mean."""
    ordered, count = numbers.sort(0).values, len(numbers)
    low, high = ordered[(count - 1) // 2], ordered[count // 2]
    return low if count % 2 else low + (high - low) / 2


def _median_rows(members: Weighted, rank: int) -> torch.Tensor:
    """Return A (rank, in), each row the median over the members that have it: the frame of a new A.

    Few may have the last rows, so rows are shortened to a plausible norm first: a frame that is far longer in
    some directions would lose the others to rounding.
    """
    rows = []
    for row in range(rank):
        having = [factors.A[row] for _, factors in members if factors.rank > row]
        shortened = [one * min(1.0, LONGEST_ROW / max(float(one.norm()), 1e-30)) for one in having]
        rows.append(_median(torch.stack(shortened)) if having else torch.zeros_like(members[0][1].A[0]))
    return torch.stack(rows)


def _one_rank(members: Weighted) -> bool:
    return len({factors.rank for _, factors in members}) == 1


def _squared_distances(layers: Sequence[Factors]) -> torch.Tensor:
    """Return squared distances (n, n) of one layer: of its factors, or of its products if ranks differ."""
    count = len(layers)
    wide = [Factors(one.A.double(), one.B.double()) for one in layers]
    distances = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(i):
            distances[i, j] = distances[j, i] = _squared_distance(wide[i], wide[j])
    for i, one in enumerate(layers):
        if one.magnitude is not None:
            for j, other in enumerate(layers):
                distances[i, j] += float((one.magnitude.double() - other.magnitude.double()).square().sum())  # type: ignore[union-attr]
    return distances


def _squared_distance(one: Factors, other: Factors) -> float:
    if one.rank == other.rank:
        return float((one.A - other.A).square().sum() + (one.B - other.B).square().sum())
    # || P - Q ||^2 of stacked factors, from Gram matrices (R, R)
    B, A = torch.cat([one.B, -other.B], 1), torch.cat([one.A, other.A])
    return max(0.0, float(((B.T @ B) * (A @ A.T)).sum()))
