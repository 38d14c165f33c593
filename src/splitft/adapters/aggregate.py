"""From many clients' adapters, of unequal cuts and ranks, to one.

Every participant brings a full set over all L blocks, whatever its cut (its own blocks, and those that the
server trained for it). Per layer, with weights w_i that sum to 1, the mean update is

    mean(BA) = sum_i w_i B_i A_i

and a rule finds factors of a given rank for it. `mean(B) mean(A)` is not that mean; how far each rule is
from it is its aggregation error, ||mean(BA) - B A|| / ||mean(BA)|| over all layers together.

No rule forms a D x D product: stacked factors B' (out, sum r), A' (sum r, in) are orthogonalised (QR),
and all norms and singular values are those of a core of at most (sum r, sum r).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from splitft.adapters.state import AdapterState, Factors, Key, fresh_rows
from splitft.errors import AdapterError

A_ROW_NORM = 1 / math.sqrt(3)
"""Norm of a row of A as LoRA initialises it; rules that re-factor give A rows of this norm."""

Weighted = Sequence[tuple[float, Factors]]


@dataclass(frozen=True)
class Aggregated:
    """What a rule made of the participants' adapters."""

    state: AdapterState
    error: float
    """||mean(BA) - B A|| / ||mean(BA)||; 0 if the mean is 0."""


@dataclass(frozen=True)
class Fresh:
    """Where new directions come from when a rank grows: rows as LoRA initialises them, B zero."""

    seed: int
    salt: int
    """The round, so that regrown directions differ from dropped ones."""

    def grown(self, key: Key, factors: Factors, rank: int) -> Factors:
        """`factors` at a higher rank, with the same product."""
        extra = rank - factors.rank
        if extra <= 0:
            return factors
        A, B = factors.A, factors.B
        rows = fresh_rows(key, extra, A.shape[1], self.seed, salt=self.salt, dtype=A.dtype).to(A.device)
        return Factors(torch.cat([A, rows]), torch.cat([B, B.new_zeros(B.shape[0], extra)], 1))


def average_factors(key: Key, members: Weighted, rank: int, fresh: Fresh) -> Factors:
    """FedAvg of A and of B apart: A = sum w_i A_i, B = sum w_i B_i (McMahan et al. 2017, 1602.05629).

    The baseline; needs equal ranks.
    """
    ranks = sorted({factors.rank for _, factors in members})
    if len(ranks) > 1:
        raise AdapterError(
            f"block {key[0]} comes with ranks {', '.join(map(str, ranks))}; rule 'factors' needs equal "
            "ranks: choose zero-pad or svd, or lora.rank_at_cut: null"
        )
    return _mean(members)


def zero_pad(key: Key, members: Weighted, rank: int, fresh: Fresh) -> Factors:
    """HetLoRA (Cho et al. 2024, 2401.06432): pad with zeros to the largest rank, then average factors."""
    largest = max(factors.rank for _, factors in members)
    return _mean([(weight, _padded(factors, largest)) for weight, factors in members])


def best_products(key: Key, members: Weighted, rank: int, fresh: Fresh) -> Factors:
    """FlexLoRA (2402.11505), HLoRA (2503.00813): the best rank-R approximation of sum w_i B_i A_i."""
    B = torch.cat([math.sqrt(weight) * factors.B for weight, factors in members], 1)
    A = torch.cat([math.sqrt(weight) * factors.A for weight, factors in members])
    if not torch.count_nonzero(B):  # nothing learnt yet: keep the directions that A starts with
        return _mean([(weight, _padded(factors, rank)) for weight, factors in members])
    return _refactored(key, Factors(A, B), rank, fresh)


AGGREGATORS: dict[str, Callable[[Key, Weighted, int, Fresh], Factors]] = {
    "factors": average_factors,
    "zero-pad": zero_pad,
    "svd": best_products,
}


def aggregate(
    rule: str,
    members: Sequence[tuple[float, AdapterState]],
    ranks: Mapping[int, int],
    fresh: Fresh,
) -> Aggregated:
    """One adapter set of the given ranks by block, from (weight, full set) of every participant.

    Weights are made to sum to 1. Raises AdapterError if they cannot be, if a set is not finite, if the sets
    cover different layers, or if the rule cannot unite their ranks.
    """
    if not members:
        raise AdapterError("nothing to aggregate: no participant finished the round")
    total = sum(weight for weight, _ in members)
    if min(weight for weight, _ in members) < 0 or not 0 < total < math.inf:
        listed = ", ".join(f"{weight:g}" for weight, _ in members)
        raise AdapterError(f"weights {listed} make no mean: none may be negative, and one must be positive")
    keys = members[0][1].keys()
    for _, state in members:
        if state.keys() != keys:
            block = min(state.keys() ^ keys)[0]
            raise AdapterError(f"adapter sets do not cover the same layers: they differ at block {block}")
        if not state.all_finite():
            raise AdapterError("an adapter set has values that are not finite")
    factors: dict[Key, Factors] = {}
    missed = mean = 0.0
    for key in keys:
        weighted = [(weight / total, state[key]) for weight, state in members]
        united = AGGREGATORS[rule](key, weighted, ranks[key[0]], fresh)
        united = fit(key, united, ranks[key[0]], rule, fresh)
        missed_here, mean_here = _distance(weighted, united)
        missed, mean = missed + missed_here**2, mean + mean_here**2
        factors[key] = united
    return Aggregated(AdapterState(factors), math.sqrt(missed / mean) if mean else 0.0)


def fit(key: Key, factors: Factors, rank: int, rule: str, fresh: Fresh) -> Factors:
    """A layer's factors at another rank, as the rule does it: cut down, or grown without changing B A.

    `svd` keeps the best approximation; the others keep the first rows (HetLoRA's truncation).
    """
    if factors.rank == rank:
        return factors
    if factors.rank < rank:
        return fresh.grown(key, factors, rank)
    if rule == "svd" and torch.count_nonzero(factors.B):
        return _refactored(key, factors, rank, fresh)
    return Factors(factors.A[:rank].clone(), factors.B[:, :rank].clone())


def fit_all(state: AdapterState, ranks: Mapping[int, int], rule: str, fresh: Fresh) -> AdapterState:
    """`fit` for every layer of the state; `ranks` by block."""
    return AdapterState({key: fit(key, value, ranks[key[0]], rule, fresh) for key, value in state.items()})


def _mean(members: Weighted) -> Factors:
    first_weight, first = members[0]
    A, B = first_weight * first.A, first_weight * first.B
    for weight, factors in members[1:]:
        A, B = A + weight * factors.A, B + weight * factors.B
    return Factors(A, B)


def _padded(factors: Factors, rank: int) -> Factors:
    short = rank - factors.rank
    if short <= 0:
        return Factors(factors.A[:rank], factors.B[:, :rank])
    pad = torch.nn.functional.pad
    return Factors(pad(factors.A, (0, 0, 0, short)), pad(factors.B, (0, short)))


def _refactored(key: Key, stacked: Factors, rank: int, fresh: Fresh) -> Factors:
    """Best approximation of B A at `rank`, with A's rows at the norm that LoRA starts with."""
    Qb, Rb = torch.linalg.qr(stacked.B.double())
    Qa, Ra = torch.linalg.qr(stacked.A.double().T)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T)
    # directions below rounding carry nothing: they become fresh ones, free to learn
    eps = torch.finfo(stacked.A.dtype).eps
    kept = min(rank, int((S[0] * eps < S).sum()))
    B = (Qb @ (U[:, :kept] * S[:kept])) / A_ROW_NORM
    A = (Vh[:kept] @ Qa.T) * A_ROW_NORM
    return fresh.grown(key, Factors(A.to(stacked.A.dtype), B.to(stacked.B.dtype)), rank)


def _distance(members: Weighted, united: Factors) -> tuple[float, float]:
    """(||mean(BA) - B A||, ||mean(BA)||) in the Frobenius norm."""
    B = torch.cat([weight * factors.B.double() for weight, factors in members], 1)
    A = torch.cat([factors.A.double() for _, factors in members])
    B_all, A_all = torch.cat([B, -united.B.double()], 1), torch.cat([A, united.A.double()])
    return _product_norm(B_all, A_all), _product_norm(B, A)


def _product_norm(B: torch.Tensor, A: torch.Tensor) -> float:
    """||B A|| from the triangular parts of B and A^T."""
    Rb = torch.linalg.qr(B, mode="r").R
    Ra = torch.linalg.qr(A.T, mode="r").R
    return float(torch.linalg.matrix_norm(Rb @ Ra.T))
