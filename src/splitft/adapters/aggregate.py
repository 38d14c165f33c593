"""Aggregate the adapters of many clients, of unequal cuts and ranks, by a rule.

Every participant has a full set over all L blocks, whatever its cut (its own blocks, and those that the
server trained for it). Per layer, with weights w_i that sum to 1, the mean update is

    mean(BA) = sum_i w_i B_i A_i

and a rule (`splitft.specs.rules`, `aggregators`) finds factors of a given rank for it, and may fold a part of
it into the frozen base. `mean(B) mean(A)` is not that mean; the distance of a rule's result from it is its
aggregation error, ||mean(BA) - B A - folded|| / ||mean(BA)|| over all layers together.

A rule that withstands hostile members (`robust_aggregators`) is given them with equal weights, and how many
of them to withstand; the error is still the distance from the weighted mean.

No rule forms a D x D product of few clients: stacked factors B' (out, sum r), A' (sum r, in) are
orthogonalised (QR), and all norms and singular values are those of a core of at most (sum r, sum r). Above a
rank sum of `mean_product.MOST_STACKED`, the product is compressed instead, and its norms are estimates.

A layer's factors are moved to the device one member at a time, as they are read; results return to the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from splitft.adapters.aggregators import Fresh, United
from splitft.adapters.factoring import in_frame
from splitft.adapters.mean_product import mean_norm
from splitft.adapters.members import LayerMembers, MembersWithout, Weighted
from splitft.adapters.state import CPU, AdapterState, Factors, Key
from splitft.errors import AdapterError, FailedRoundError
from splitft.specs.rules import RULES, Rule, rules_where

NOT_FINITE = "numbers that are not finite"
WITHOUT_FLOAT64 = ("mps",)
"""Types of device that lack float64, in which stacked factors are decomposed."""


@dataclass(frozen=True)
class Aggregated:
    """Result of an aggregation."""

    state: AdapterState
    """Global factors of the next round."""
    error: float
    """||mean(BA) - B A - folded|| / ||mean(BA)|| over all layers; 0 if the mean is 0.

    Layers whose B stayed with the clients are left out. Within about one per cent where many clients meet
    (`mean_product.mean_norm`), else exact.
    """
    folded: AdapterState = field(default_factory=AdapterState)
    """Update that joins the frozen base, by layer, each at its own rank."""

    def product(self, key: Key) -> torch.Tensor:
        """Return the layer's whole update B A + folded (out, in); for tests only."""
        product = self.state[key].product()
        return product + self.folded[key].product() if key in self.folded else product


def aggregate(
    rule: str,
    members: Sequence[tuple[float, AdapterState]],
    ranks: Mapping[int, int],
    fresh: Fresh,
    byzantine: int | None = None,
    device: torch.device = CPU,
) -> Aggregated:
    """Aggregate (weight, full set) of every participant to one set of the given ranks by block.

    Weights are normalised to sum to 1. `byzantine` as in the configuration; `device` computes what a rule
    does to a layer (`Rule.on_device`) and the error. Raises AdapterError for unusable weights, sets that are
    not finite or cover different layers, and a rule that does not fit their ranks, fails or returns unusable
    factors; its kind FailedRoundError if the next round's factors may do.
    """
    _check(members)
    total = sum(weight for weight, _ in members)
    weighted = [(weight / total, state) for weight, state in members]
    chosen, hostile = _chosen(rule, members, total, byzantine)
    device = device if device.type not in WITHOUT_FLOAT64 else CPU
    factors: dict[Key, Factors] = {}
    folded: dict[Key, Factors] = {}
    missed = mean = 0.0
    for key in members[0][1]:
        on_device = LayerMembers(chosen, key, device)
        given = on_device if RULES[rule].on_device else [(weight, state[key]) for weight, state in chosen]
        united = _united(rule, key, given, hostile, ranks[key[0]], fresh)
        made = [fit(key, united.factors, ranks[key[0]], rule, fresh)]
        made += [] if united.folded is None else [united.folded]
        if all(state[key].names == "AB" for _, state in weighted):
            layer = LayerMembers(weighted, key, device)
            distance, norm = _distance(layer, [one.to(device) for one in made])
            missed, mean = missed + distance**2, mean + norm**2
        factors[key], *rest = (one.to(CPU) for one in made)
        folded.update((key, one) for one in rest)
    error = math.sqrt(missed / mean) if mean else 0.0
    return Aggregated(AdapterState(factors), error, AdapterState(folded))


def _check(members: Sequence[tuple[float, AdapterState]]) -> None:
    """Raise AdapterError for sets or weights that have no mean."""
    if not members:
        raise AdapterError("nothing to aggregate: no participant finished the round")
    total = sum(weight for weight, _ in members)
    if min(weight for weight, _ in members) < 0 or not 0 < total < math.inf:
        listed = ", ".join(f"{weight:g}" for weight, _ in members)
        raise AdapterError(f"weights {listed} have no mean: give weights of at least 0, and one above it")
    keys = members[0][1].keys()
    for _, state in members:
        if state.keys() != keys:
            block = min(state.keys() ^ keys)[0]
            raise AdapterError(f"adapter sets do not cover the same layers: they differ at block {block}")
        if not state.all_finite():
            raise AdapterError("an adapter set has values that are not finite")


def _chosen(
    name: str, members: Sequence[tuple[float, AdapterState]], total: float, byzantine: int | None
) -> tuple[list[tuple[float, AdapterState]], int]:
    """Return the members that a rule unites, with their weights, and how many hostile ones it withstands."""
    rule = RULES[name]
    if rule.withstands is None:
        return [(weight / total, state) for weight, state in members], 0
    counted = [(1.0, state) for weight, state in members if weight]
    hostile = hostile_members(name, len(counted), byzantine)
    if rule.select is not None:
        counted = rule.select(counted, hostile)
    return [(1 / len(counted), state) for _, state in counted], hostile


def hostile_members(name: str, members: int, byzantine: int | None) -> int:
    """Return how many of so many members a rule withstands: `byzantine`, or by default a fifth, rounded up.

    Raises FailedRoundError if that is more than it can.
    """
    most = RULES[name].withstands or (lambda members: 0)
    if byzantine is None:
        return min(most(members), math.ceil(members / 5))
    if byzantine > most(members):
        raise FailedRoundError(
            f"aggregation rule {name!r} withstands {most(members)} hostile of {members} participants, and "
            f"aggregate.byzantine asks for {byzantine}"
        )
    return byzantine


def _united(name: str, key: Key, members: Weighted, hostile: int, rank: int, fresh: Fresh) -> United:
    """Return what a rule makes of one layer. Raise AdapterError if it fails or returns unusable factors."""
    rule, layer = RULES[name], f"block {key[0]} {key[1]}"
    ranks = sorted({factors.rank for _, factors in members})
    if rule.equal_ranks and len(ranks) > 1:
        raise AdapterError(
            f"block {key[0]} comes with ranks {', '.join(map(str, ranks))}; rule {name!r} needs equal ranks: "
            f"give {rules_where(lambda one: not one.equal_ranks)}, or set lora.rank_at_cut: null"
        )
    try:
        more = (hostile,) if rule.takes_hostile else ()
        united: United = rule.unite(key, members, rank, fresh, *more)
    except Exception as error:  # a plug-in's function may raise anything
        kind = "" if isinstance(error, AdapterError) else f"{type(error).__name__}: "
        raise AdapterError(f"aggregation rule {name!r} failed at {layer}: {kind}{error}") from error
    if fault := _fault(rule, united, members[0][1]):
        kind_of_error = FailedRoundError if fault == NOT_FINITE else AdapterError
        raise kind_of_error(f"aggregation rule {name!r} returned {fault} for {layer}")
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
            return NOT_FINITE
    if member.magnitude is not None and united.factors.magnitude is None:
        return "no magnitude (DoRA)"
    return None


def fit(key: Key, factors: Factors, rank: int, rule: str, fresh: Fresh) -> Factors:
    """Return a layer's factors at another rank: cut down as the rule does it, or grown without changing B A.

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
    """Fit every layer of the state to its rank; `ranks` by block."""
    return AdapterState({key: fit(key, value, ranks[key[0]], rule, fresh) for key, value in state.items()})


def _distance(members: Weighted, made: Sequence[Factors]) -> tuple[float, float]:
    """Return (||mean(BA) - sum of `made`||, ||mean(BA)||) in the Frobenius norm."""
    return mean_norm(MembersWithout(members, made)), mean_norm(members)
