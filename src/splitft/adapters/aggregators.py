"""The functions of the aggregation rules (`splitft.specs.rules`): one layer's factors of the next round.

    mean(BA) = sum_i w_i B_i A_i        weights w_i sum to 1, client i of rank r_i

What is *folded* is an update that nobody trains any more. The papers add it to the frozen base weights. Here
every party holds it beside the base, for its own blocks, as one more pair of factors (`adapters.folding`): in
a bfloat16 base most of a small update would be lost to rounding, and a server that works for many clients
shares its base with them.

DoRA's magnitudes (`adapters.dora`) are averaged, sum w_i m_i, beside what `factors`, `zero-pad` or `svd` make
of A and B. The other rules are refused with them: what is folded into the base would change the very weight
whose rows the magnitudes rescale, and with A or B alone on the way a magnitude would belong to another
direction than its own. W' is not linear in m and B A, so that this is no mean of the weights in use; the
error that is reported is that of B A.

`stack`, `exact`, `ffa` and `fedsa` keep the global factors at the full rank R. A client of lower rank trains
their first rows and carries the others frozen, so that no lowered rank drops what others have learnt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from splitft.adapters.factoring import in_frame, product_norm, refactored, stacked
from splitft.adapters.state import Factors, Key, fresh_rows
from splitft.errors import AdapterError

Weighted = Sequence[tuple[float, Factors]]


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
        return replace(factors, A=torch.cat([A, rows]), B=torch.cat([B, B.new_zeros(B.shape[0], extra)], 1))


@dataclass(frozen=True)
class United:
    """What a rule makes of one layer."""

    factors: Factors
    """To train from in the next round."""
    folded: Factors | None = None
    """What joins the frozen base; its product is added to that of `factors`."""


def average_factors(key: Key, members: Weighted, rank: int, fresh: Fresh) -> United:
    """FedAvg of A and of B apart: A = sum w_i A_i, B = sum w_i B_i (McMahan et al. 2017, 1602.05629).

    The baseline; needs equal ranks.
    """
    return United(_mean(members))


def zero_pad(key: Key, members: Weighted, rank: int, fresh: Fresh) -> United:
    """HetLoRA (Cho et al. 2024, 2401.06432): pad with zeros to the largest rank, then average factors."""
    return United(_padded_mean(members))


def best_products(key: Key, members: Weighted, rank: int, fresh: Fresh) -> United:
    """FlexLoRA (2402.11505), HLoRA (2503.00813): the best rank-R approximation of sum w_i B_i A_i.

    Of all factors of it, those near the members' mean A: what one client trains comes back as it was.
    """
    if not any(torch.count_nonzero(factors.B) for weight, factors in members if weight):
        # nothing learnt yet: keep the directions that A starts with
        return United(_mean([(weight, padded(factors, rank)) for weight, factors in members]))
    B = torch.cat([math.sqrt(weight) * factors.B for weight, factors in members], 1)
    A = torch.cat([math.sqrt(weight) * factors.A for weight, factors in members])
    return United(in_frame(Factors(A, B, _mean_magnitude(members)), rank, _mean_rows(members, rank)))


def stack_factors(key: Key, members: Weighted, rank: int, fresh: Fresh) -> United:
    """FLoRA (Wang et al. 2024, 2409.05976): [w_1 B_1 ... w_n B_n] [A_1; ...; A_n] = mean(BA), exactly.

    The stack, of rank sum r_i at most, is folded into the base, and the next round begins with fresh A and
    B = 0, from exactly mean(BA).
    """
    first = members[0][1]
    start = Factors(first.A[:0], first.B[:, :0])
    return United(fresh.grown(key, start, rank), _folded(stacked(members), members))


def average_with_residual(key: Key, members: Weighted, rank: int, fresh: Fresh) -> United:
    """FedEx-LoRA (Singhal et al. 2024, 2410.09432): A and B averaged, what they miss goes into the base.

    The residual sum w_i B_i A_i - B A lies in the span of the members' own factors, so its rank is at most
    sum r_i, and it travels as factors of that rank. Unequal ranks are padded with zeros first.
    """
    mean = _padded_mean(members)
    return United(mean, _folded(stacked([*members, (-1.0, mean)]), members))


def average_b(key: Key, members: Weighted, rank: int, fresh: Fresh) -> United:
    """FFA-LoRA (Sun et al. 2024, 2403.12313): A is frozen at its shared start, so sum w_i B_i is exact.

    sum w_i (B_i A) = (sum w_i B_i) A; with unequal ranks B_i is padded with zeros, as A has its first rows.
    """
    _, widest = max(members, key=lambda member: member[1].rank)
    return United(Factors(widest.A, _padded_mean(members).B))


def average_a(key: Key, members: Weighted, rank: int, fresh: Fresh) -> United:
    """FedSA-LoRA (Guo et al. 2024, 2410.01463): A is averaged, each client goes on with its own B_i.

    A row of A is averaged over the members that have it. B is given as sum w_i B_i where all are known: what
    the clients' own updates B_i A are on average, and so what the reported error compares with mean(BA).
    """
    A = _mean_rows(members, max(factors.rank for _, factors in members))
    complete = all(factors.halves == "AB" for _, factors in members)
    return United(Factors(A, _padded_mean(members).B if complete else A.new_empty(0, len(A))))


def padded(factors: Factors, rank: int) -> Factors:
    """At this rank, with zeros behind or cut down to the first rows."""
    short = rank - factors.rank
    if short <= 0:
        return factors.first(rank)
    pad = torch.nn.functional.pad
    return replace(factors, A=pad(factors.A, (0, 0, 0, short)), B=pad(factors.B, (0, short)))


def _mean_rows(members: Weighted, rank: int) -> torch.Tensor:
    """(rank, in): each row of A over the members that have it; the widest's own if none of them counts."""
    _, widest = max(members, key=lambda member: member[1].rank)
    rows = padded(widest, rank).A
    weights, total = rows.new_zeros(rank), torch.zeros_like(rows)
    for weight, factors in members:
        here = min(factors.rank, rank)
        weights[:here] += weight
        total[:here] += weight * factors.A[:here]
    heard = (weights > 0)[:, None]
    return torch.where(heard, total / torch.where(heard, weights[:, None], 1.0), rows)


def _padded_mean(members: Weighted) -> Factors:
    largest = max(factors.rank for _, factors in members)
    return _mean([(weight, padded(factors, largest)) for weight, factors in members])


def _mean(members: Weighted) -> Factors:
    first_weight, first = members[0]
    A, B = first_weight * first.A, first_weight * first.B
    for weight, factors in members[1:]:
        A, B = A + weight * factors.A, B + weight * factors.B
    return Factors(A, B, _mean_magnitude(members))


def _mean_magnitude(members: Weighted) -> torch.Tensor | None:
    """sum w_i m_i of DoRA's magnitudes, as changes from those of the base that all share; None for LoRA."""
    known = [(weight, factors.magnitude) for weight, factors in members if factors.magnitude is not None]
    if not known:
        return None
    if len(known) < len(members):
        raise AdapterError("some adapter sets have magnitudes (DoRA) and others have none")
    total = torch.zeros_like(known[0][1])
    for weight, magnitude in known:
        total = total + weight * magnitude
    return total


def _folded(whole: Factors, members: Weighted) -> Factors | None:
    """The product at its own rank; None if it is no more than rounding of the members' mean.

    Its rank is at most that of the members together; what the type's rounding adds beyond is left out.
    """
    dtype, most = members[0][1].A.dtype, sum(factors.rank for _, factors in members)
    rounding = max(0.01 * torch.finfo(dtype).eps, 32 * torch.finfo(torch.float64).eps)
    small = refactored(whole, most, dtype, floor=rounding * product_norm(stacked(members)))
    return small if small.rank else None
