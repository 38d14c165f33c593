"""From many clients' adapters, of unequal cuts and ranks, to one.

Every participant brings a full set over all L blocks, whatever its cut (its own blocks, and those that the
server trained for it). Per layer, with weights w_i that sum to 1, the mean update is

    mean(BA) = sum_i w_i B_i A_i

and a rule (`rules`) finds factors of a given rank for it, and may fold a part of it into the frozen base.
`mean(B) mean(A)` is not that mean; how far each rule is from it is its aggregation error,
||mean(BA) - B A - folded|| / ||mean(BA)|| over all layers together.

No rule forms a D x D product: stacked factors B' (out, sum r), A' (sum r, in) are orthogonalised (QR),
and all norms and singular values are those of a core of at most (sum r, sum r).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from splitft.adapters.factoring import in_frame, product_norm, stacked
from splitft.adapters.rules import AGGREGATORS, Fresh, United, Weighted
from splitft.adapters.state import AdapterState, Factors, Key
from splitft.errors import AdapterError


@dataclass(frozen=True)
class Aggregated:
    """What a rule made of the participants' adapters."""

    state: AdapterState
    """Factors to train from."""
    error: float
    """||mean(BA) - B A - folded|| / ||mean(BA)|| over the layers that can be compared; 0 if the mean is 0.

    A layer whose B stayed with the clients cannot be compared.
    """
    folded: AdapterState = field(default_factory=AdapterState)
    """What joins the frozen base, of the layers that have such a part; each at its own rank."""

    def product(self, key: Key) -> torch.Tensor:
        """The layer's whole update B A + folded (out, in), for tests; nothing else forms it."""
        product = self.state[key].product()
        return product + self.folded[key].product() if key in self.folded else product


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
    _check(members)
    total = sum(weight for weight, _ in members)
    factors: dict[Key, Factors] = {}
    folded: dict[Key, Factors] = {}
    missed = mean = 0.0
    for key in members[0][1]:
        weighted = [(weight / total, state[key]) for weight, state in members]
        united = AGGREGATORS[rule].unite(key, weighted, ranks[key[0]], fresh)
        factors[key] = fit(key, united.factors, ranks[key[0]], rule, fresh)
        if united.folded is not None:
            folded[key] = united.folded
        if all(one.halves == "AB" for _, one in weighted):
            missed_here, mean_here = _distance(weighted, United(factors[key], united.folded))
            missed, mean = missed + missed_here**2, mean + mean_here**2
    error = math.sqrt(missed / mean) if mean else 0.0
    return Aggregated(AdapterState(factors), error, AdapterState(folded))


def _check(members: Sequence[tuple[float, AdapterState]]) -> None:
    """Raise AdapterError for sets or weights that make no mean."""
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


def fit(key: Key, factors: Factors, rank: int, rule: str, fresh: Fresh) -> Factors:
    """A layer's factors at another rank, as the rule does it: cut down, or grown without changing B A.

    `svd` keeps the best approximation, near the first rows of A; the others keep the first rows (HetLoRA's
    truncation).
    """
    if factors.rank > rank and rule == "svd" and torch.count_nonzero(factors.B):
        factors = in_frame(factors, rank, factors.A)
    if factors.rank < rank:
        return fresh.grown(key, factors, rank)
    if factors.rank > rank:
        return replace(factors, A=factors.A[:rank].clone(), B=factors.B[:, :rank].clone())
    return factors


def fit_all(state: AdapterState, ranks: Mapping[int, int], rule: str, fresh: Fresh) -> AdapterState:
    """`fit` for every layer of the state; `ranks` by block."""
    return AdapterState({key: fit(key, value, ranks[key[0]], rule, fresh) for key, value in state.items()})


def _distance(members: Weighted, united: United) -> tuple[float, float]:
    """(||mean(BA) - B A - folded||, ||mean(BA)||) in the Frobenius norm."""
    made = [(-1.0, one) for one in (united.factors, united.folded) if one is not None]
    return product_norm(stacked([*members, *made])), product_norm(stacked(members))
