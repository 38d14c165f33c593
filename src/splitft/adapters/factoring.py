"""Arithmetic on products B A that are never formed.

    B (out, R), A (R, in)  --QR of both-->  core (R, R)  --SVD-->  directions above rounding

A D x D product of a layer would cost D^2 numbers; the QR of two thin factors costs D R, and every norm and
singular value of B A is one of the small core. R here is a rank, or the sum of the ranks of stacked factors.

An update that is folded into the frozen base is kept as factors beside it:

    weight of a layer in use = W + scale * (B A + F_B F_A)        A, B trained; F_B F_A folded, for all alike

Round after round the folded parts are stacked. When their rank reaches that of a full matrix they are
re-factored without loss, so they never take more than a full matrix's two square factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from splitft.adapters.state import AdapterState, Factors

A_ROW_NORM = 1 / math.sqrt(3)
"""Norm of a row of A as LoRA initialises it; re-factored A have rows of this norm."""

LEAST_STRETCH = 0.3
"""Smallest stretch of a direction by a frame, as a share of a row's usual norm."""


def stacked(members: Sequence[tuple[float, Factors]]) -> Factors:
    """Return factors of sum_i w_i B_i A_i at the rank sum: B' = [w_1 B_1 ...], A' = [A_1; ...]."""
    B = torch.cat([weight * factors.B.double() for weight, factors in members], 1)
    return Factors(torch.cat([factors.A.double() for _, factors in members]), B)


def refactored(
    factors: Factors, rank: int | None = None, dtype: torch.dtype | None = None, floor: float = 0.0
) -> Factors:
    """Return the best approximation of B A of at most `rank` (Eckart and Young); None keeps the product.

    Rows of A are orthogonal, of the norm that LoRA starts with, in order of their singular values. Directions
    below rounding in `dtype` (the factors' own by default), or whose singular value is below `floor`, are
    left out, so the rank of the result may be lower, down to 0.
    """
    dtype = dtype or factors.A.dtype
    left, right = _directions(factors, rank, dtype, floor)
    return replace(factors, A=(right * A_ROW_NORM).to(dtype), B=(left / A_ROW_NORM).to(dtype))


def in_frame(factors: Factors, rank: int, frame: torch.Tensor) -> Factors:
    """Return the same approximation with A as near as possible to the rows of `frame` (>= rank, in).

    Every invertible M gives factors B = U S M^-1, A = M V^T of the same product U S V^T; M = frame V makes A
    the rows of the frame, as far as the product's directions V reach. Singular directions themselves train
    slowly: in their order the first row of A reads nearly all of what a layer's inputs have in common, and
    Adam's steps, as large for every element of B, are spent on the others' small activations. Near the
    factors that were trained last, training goes on as if nothing had been decomposed (SmolLM2-135M on E2E
    after four rounds, one seed: 1.630 nats; in a random orthogonal frame 1.639, with factors averaged 1.625).
    Singular values of M below `LEAST_STRETCH` of a row's usual norm are raised to it, so that neither factor
    outgrows the other.
    """
    left, right = _directions(factors, rank, factors.A.dtype, 0.0)
    U, S, Vh = torch.linalg.svd(frame.double()[: len(right)] @ right.T)
    S = S.clamp(min=LEAST_STRETCH * A_ROW_NORM)
    A, B = (U * S) @ Vh @ right, (left @ Vh.T / S) @ U.T
    return replace(factors, A=A.to(factors.A.dtype), B=B.to(factors.B.dtype))


def _directions(
    factors: Factors, rank: int | None, dtype: torch.dtype, floor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return U S (out, kept) and V^T (kept, in) of the product, in float64."""
    Qb, Rb = torch.linalg.qr(factors.B.double())
    Qa, Ra = torch.linalg.qr(factors.A.double().T)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T)
    above = int((max(float(S[0]) * torch.finfo(dtype).eps, floor) < S).sum()) if len(S) else 0
    kept = above if rank is None else min(rank, above)
    return Qb @ (U[:, :kept] * S[:kept]), Vh[:kept] @ Qa.T


def product_norm(factors: Factors) -> float:
    """Return ||B A|| in the Frobenius norm, from the triangular parts of B and A^T."""
    if not factors.rank:
        return 0.0
    Rb = torch.linalg.qr(factors.B.double(), mode="r").R
    Ra = torch.linalg.qr(factors.A.double().T, mode="r").R
    return float(torch.linalg.matrix_norm(Rb @ Ra.T))


def add_folded(folded: AdapterState, more: AdapterState) -> AdapterState:
    """Return the sum of two folded updates, layer by layer."""
    return AdapterState({
        key: _within_full_rank(folded[key].followed_by(more[key])) if key in folded and key in more
        else folded.get(key) or more[key]
        for key in folded.keys() | more.keys()
    })  # fmt: skip


def with_folded(state: AdapterState, folded: AdapterState) -> AdapterState:
    """Return one adapter with the products of both, as it is exported and evaluated."""
    return AdapterState({
        key: _within_full_rank(refactored(factors.followed_by(folded[key]))) if key in folded else factors
        for key, factors in state.items()
    })  # fmt: skip


def _within_full_rank(factors: Factors) -> Factors:
    full = min(factors.A.shape[1], factors.B.shape[0])
    return refactored(factors) if factors.rank > full else factors
