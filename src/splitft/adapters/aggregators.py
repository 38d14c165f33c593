"""Functions of the aggregation rules (`splitft.specs.rules`): unite the clients' factors of one layer.

    mean(BA) = sum_i w_i B_i A_i        weights w_i sum to 1, client i of rank r_i

An update that is *folded* is not trained any more. The papers add it to the frozen base weights. Here every
party keeps it beside the base, for its own blocks, as one more pair of factors (`adapters.factoring`): in a
bfloat16 base most of a small update would be lost to rounding, and all clients share the server's base.

DoRA's magnitudes (`adapters.dora`) are averaged, sum w_i m_i, by `factors`, `zero-pad` and `svd`. The other
rules do not support them: an update that is folded into the base would change the weight whose rows the
magnitudes rescale, and where A or B travels alone, a magnitude would be combined with another direction than
its own. W' is not linear in m and B A, so the result is not the mean of the weights in use; the error that is
reported is that of B A.

`stack`, `exact`, `ffa` and `fedsa` keep the global factors at the full rank R. A client of lower rank trains
their first rows and holds the others frozen, so that no lowered rank drops what other clients have learnt.

Members are read one at a time, and means are summed up in place, so memory does not grow with their number;
`adapters.mean_product` does the same for products. What is folded has the rank of all members together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from splitft.adapters.factoring import in_frame, product_norm, refactored, stacked
from splitft.adapters.mean_product import MOST_STACKED, MeanProduct, compressed, mean_norm, stacked_rank
from splitft.adapters.members import MembersWithout, Weighted
from splitft.adapters.state import Factors, Key, fresh_rows
from splitft.errors import AdapterError


@dataclass(frozen=True)
class Fresh:
    """Source of new directions when a rank grows: rows of A as LoRA initialises them, B zero."""

    seed: int
    salt: int
    """The round, so that regrown directions differ from dropped ones."""

    def grown(self, key: Key, factors: Factors, rank: int) -> Factors:
        """Return `factors` at a higher rank, with the same product."""
        extra = rank - factors.rank
        if extra <= 0:
            return factors
        A, B = factors.A, factors.B
        rows = fresh_rows(key, extra, A.shape[1], self.seed, salt=self.salt, dtype=A.dtype).to(A.device)
        return replace(factors, A=torch.cat([A, rows]), B=torch.cat([B, B.new_zeros(B.shape[0], extra)], 1))


@dataclass(frozen=True)
class United:
    """Result of a rule for one layer."""

    factors: Factors
    """Factors of the next round."""
    folded: Factors | None = None
    """Update that joins the frozen base, beside the product of `factors`."""


def average_factors(key: Key, members: Weighted, rank: int, fresh: Fresh) -> United:
    """Average A and B separately (FedAvg, McMahan et al. 2017, 1602.05629): sum w_i A_i, sum w_i B_i.

    The baseline; needs equal ranks.
    """
    return United(_padded_mean(members))


def zero_pad(key: Key, members: Weighted, rank: int, fresh: Fresh) -> United:
    """Pad with zeros to the largest rank, then average factors (HetLoRA, Cho et al. 2024, 2401.06432)."""
    return United(_padded_mean(members))


def best_products(key: Key, members: Weighted, rank: int, fresh: Fresh) -> United:
    """Return the best rank-R approximation of sum w_i B_i A_i (FlexLoRA 2402.11505, HLoRA 2503.00813).

    Of all factors of it, those near the members' mean A: the factors of a single client are unchanged.
    """
    if not any(torch.count_nonzero(factors.B) for weight, factors in members if weight):
        # nothing learnt yet: keep the directions that A starts with
        return United(_padded_mean(members, rank))
    whole = replace(compressed(members, rank), magnitude=_mean_magnitude(members))
    return United(in_frame(whole, rank, _mean_rows(members, rank)))


def stack_factors(key: Key, members: Weighted, rank: int, fresh: Fresh) -> United:
    """Fold [w_1 B_1 ... w_n B_n] [A_1; ...; A_n] = mean(BA) (FLoRA, Wang et al. 2024, 2409.05976).

    The stack has rank sum r_i at most; the next round begins with fresh A and B = 0, at exactly mean(BA).
    """
    first = members[0][1]
    start = Factors(first.A[:0], first.B[:, :0])
    return United(fresh.grown(key, start, rank), _folded(members, members))


def average_with_residual(key: Key, members: Weighted, rank: int, fresh: Fresh) -> United:
    """Average A and B, and fold the residual (FedEx-LoRA, Singhal et al. 2024, 2410.09432).

    The residual sum w_i B_i A_i - B A lies in the span of the members' own factors, so its rank is at most
    sum r_i, and it is sent as factors of that rank. Unequal ranks are padded with zeros first.
    """
    mean = _padded_mean(members)
    return United(mean, _folded(MembersWithout(members, [mean]), members))


def average_b(key: Key, members: Weighted, rank: int, fresh: Fresh) -> United:
    """Average B beside a frozen A that all share (FFA-LoRA, Sun et al. 2024, 2403.12313), which is exact.

    sum w_i (B_i A) = (sum w_i B_i) A; with unequal ranks B_i is padded with zeros, as A has its first rows.
    """
    _, widest = max(members, key=lambda member: member[1].rank)
    return United(Factors(widest.A, _padded_mean(members).B))


def average_a(key: Key, members: Weighted, rank: int, fresh: Fresh) -> United:
    """Average A; each client keeps its own B_i (FedSA-LoRA, Guo et al. 2024, 2410.01463).

    A row of A is averaged over the members that have it. B is sum w_i B_i where all are known, for the
    reported error: its product with A is the mean of the clients' updates B_i A.
    """
    A = _mean_rows(members, max(factors.rank for _, factors in members))
    complete = all(factors.names == "AB" for _, factors in members)
    return United(Factors(A, _padded_mean(members).B if complete else A.new_empty(0, len(A))))


def _padded(factors: Factors, rank: int) -> Factors:
    """Return factors at this rank, padded with zeros or cut down to the first rows."""
    short = rank - factors.rank
    if short <= 0:
        return factors.first(rank)
    pad = torch.nn.functional.pad
    return replace(factors, A=pad(factors.A, (0, 0, 0, short)), B=pad(factors.B, (0, short)))


def _mean_rows(members: Weighted, rank: int) -> torch.Tensor:
    """Return A (rank, in), each row averaged over the members that have it.

    A row whose members have weight zero is that of the member of the largest rank.
    """
    _, widest = max(members, key=lambda member: member[1].rank)
    rows = _padded(widest, rank).A
    weights, total = rows.new_zeros(rank), torch.zeros_like(rows)
    for weight, factors in members:
        shared = min(factors.rank, rank)
        weights[:shared] += weight
        total[:shared] += weight * factors.A[:shared]
    weighted = (weights > 0)[:, None]
    return torch.where(weighted, total / torch.where(weighted, weights[:, None], 1.0), rows)


def _padded_mean(members: Weighted, rank: int | None = None) -> Factors:
    """Return sum w_i A_i and sum w_i B_i at a rank, by default the largest; missing rows count as zeros."""
    rank = max(factors.rank for _, factors in members) if rank is None else rank
    first = members[0][1]
    A, B = first.A.new_zeros(rank, first.A.shape[1]), first.B.new_zeros(first.B.shape[0], rank)
    for weight, factors in members:
        shared = min(factors.rank, rank)
        A[:shared] += weight * factors.A[:shared]
        B[:, :shared] += weight * factors.B[:, :shared]
    return Factors(A, B, _mean_magnitude(members))


def _mean_magnitude(members: Weighted) -> torch.Tensor | None:
    """Return sum w_i m_i of DoRA's magnitudes, as changes from those of the base; None for LoRA."""
    total: torch.Tensor | None = None
    with_magnitude = 0
    for weight, factors in members:
        if factors.magnitude is not None:
            term = weight * factors.magnitude
            total = term if total is None else total + term
            with_magnitude += 1
    if total is not None and with_magnitude < len(members):
        raise AdapterError("some adapter sets have magnitudes (DoRA) and others have none")
    return total


def _folded(parts: Weighted, members: Weighted) -> Factors | None:
    """Return the product of `parts` at its own rank; None if it is below the rounding of the members' mean.

    Up to `MOST_STACKED` the rank is at most the sum of the members' ranks; directions that rounding adds
    beyond it are left out. Above, the stack itself is returned, of the full rank at most.
    """
    dtype, most = members[0][1].A.dtype, stacked_rank(members)
    eps = torch.finfo(dtype).eps
    if stacked_rank(parts) > MOST_STACKED:
        if mean_norm(parts) <= 32 * eps * mean_norm(members):
            return None
        whole = MeanProduct(parts).factors()
        return Factors(whole.A.to(dtype), whole.B.to(dtype))
    rounding = max(0.01 * eps, 32 * torch.finfo(torch.float64).eps)
    small = refactored(stacked(parts), most, dtype, floor=rounding * product_norm(stacked(members)))
    return small if small.rank else None
