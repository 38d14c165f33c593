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

from splitft.adapters.aggregators import Fresh, United, Weighted
from splitft.adapters.factoring import in_frame, product_norm, stacked
from splitft.adapters.state import AdapterState, Factors, Key
from splitft.errors import AdapterError
from splitft.specs.rules import RULES, Rule, rules_where


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
        united = _united(rule, key, weighted, ranks[key[0]], fresh)
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


def _united(name: str, key: Key, members: Weighted, rank: int, fresh: Fresh) -> United:
    """Return what a rule makes of one layer. Raise AdapterError if it fails or returns unusable factors."""
    rule, layer = RULES[name], f"block {key[0]} {key[1]}"
    ranks = sorted({factors.rank for _, factors in members})
    if rule.equal_ranks and len(ranks) > 1:
        raise AdapterError(
            f"block {key[0]} comes with ranks {', '.join(map(str, ranks))}; rule {name!r} needs equal ranks: "
            f"give {rules_where(lambda one: not one.equal_ranks)}, or set lora.rank_at_cut: null"
        )
    try:
        united = rule.unite(key, members, rank, fresh)
    except Exception as error:  # a plug-in's function may raise anything
        kind = "" if isinstance(error, AdapterError) else f"{type(error).__name__}: "
        raise AdapterError(f"aggregation rule {name!r} failed at {layer}: {kind}{error}") from error
    if fault := _fault(rule, united, members[0][1]):
        raise AdapterError(f"aggregation rule {name!r} returned {fault} for {layer}")
    return united


def _fault(rule: Rule, united: object, member: Factors) -> str | None:
    """Describe what is wrong with a rule's result for a layer of this member's shape, if anything is."""
    if not isinstance(united, United):
        return f"{type(united).__name__} instead of splitft.adapters.United"
    if united.folded is not None and not rule.folds:
        return "a folded part, although it was added without folds=True,"
    inputs, outputs, dtype = member.A.shape[1], member.B.shape[0], member.A.dtype
    for factors in (united.factors, *([] if united.folded is None else [united.folded])):
        if not isinstance(factors, Factors):
            return f"{type(factors).__name__} instead of splitft.adapters.Factors"
        found = (factors.B.shape[0], factors.A.shape[1])
        alone = rule.keeps_own_b and found == (0, inputs)  # B stays with the clients
        if found != (outputs, inputs) and not alone:
            return f"factors of a layer {found} instead of {(outputs, inputs)} (outputs, inputs)"
        if {factors.A.dtype, factors.B.dtype} != {dtype}:
            return f"factors of {factors.A.dtype} and {factors.B.dtype} instead of {dtype}"
        if not all(bool(torch.isfinite(half).all()) for half in (factors.A, factors.B)):
            return "numbers that are not finite"
    if member.magnitude is not None and united.factors.magnitude is None:
        return "no magnitude (DoRA)"
    return None


def fit(key: Key, factors: Factors, rank: int, rule: str, fresh: Fresh) -> Factors:
    """A layer's factors at another rank, as the rule does it: cut down, or grown without changing B A.

    A rule with `best_fit` keeps the best approximation, near the first rows of A; the others keep the first
    rows (HetLoRA's truncation).
    """
    if factors.rank > rank and RULES[rule].best_fit and torch.count_nonzero(factors.B):
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
