"""What aggregation has folded into the frozen base, as factors beside it.

    weight of a layer in use = W + scale * (B A + F_B F_A)        A, B trained; F_B F_A folded, for all alike

Round after round the folded parts are stacked. When their rank reaches that of a full matrix they are
re-factored without loss, so they never take more than a full matrix's two square factors.
"""

from __future__ import annotations

from splitft.adapters.factoring import refactored
from splitft.adapters.state import AdapterState, Factors


def add_folded(folded: AdapterState, more: AdapterState) -> AdapterState:
    """Both parts as one, layer by layer."""
    return AdapterState({
        key: _within_full_rank(folded[key].followed_by(more[key])) if key in folded and key in more
        else folded.get(key) or more[key]
        for key in folded.keys() | more.keys()
    })  # fmt: skip


def with_folded(state: AdapterState, folded: AdapterState) -> AdapterState:
    """One adapter with the products of both: what is exported, and what a run has learnt in all."""
    return AdapterState({
        key: _within_full_rank(refactored(factors.followed_by(folded[key]))) if key in folded else factors
        for key, factors in state.items()
    })  # fmt: skip


def _within_full_rank(factors: Factors) -> Factors:
    full = min(factors.A.shape[1], factors.B.shape[0])
    return refactored(factors) if factors.rank > full else factors
