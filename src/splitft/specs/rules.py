"""The aggregation rules by name, and what is true of each. No torch here.

    rule       A and B of the next round               folded into the base   trained   up   down
    factors    sum w_i A_i, sum w_i B_i                -                      A B       A B  A B
    zero-pad   the same, padded to the largest rank    -                      A B       A B  A B
    svd        best rank-R factors of mean(BA)         -                      A B       A B  A B
    stack      A fresh, B = 0                          mean(BA)               A B       A B  folded
    exact      as zero-pad                             mean(BA) - B A         A B       A B  A B, folded
    ffa        A as it started, sum w_i B_i            -                      B         B    B
    fedsa      sum w_i A_i; B_i stays with its client  -                      A B       A    A

Three rules withstand members that send anything at all, up to `Rule.withstands(n)` of n:

    median         each number is the median of the members'             (n - 1) // 2    1803.01498
    trimmed-mean   its mean without the f largest and the f smallest     (n - 1) // 2    1803.01498
    krum           the mean of the n - f members nearest to each other   (n - 3) // 2    1703.02757

Where all members of a layer have one rank, the numbers are those of A and B; else those of the products B A.
They weigh all members alike: a weight that a member could raise would let it outvote the others.

A plug-in adds its own with `RULES.add("mine", Rule(unite=function))`. The defaults promise nothing: a rule
declares that its factors keep their axes, that clipping bounds it, or that it averages DoRA's magnitudes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from splitft.errors import PluginError
from splitft.registry import Lazy, Registry


@dataclass(frozen=True)
class Rule:
    """An aggregation rule, and what it means for training, traffic and privacy."""

    unite: Callable[..., Any] | Lazy
    """(key, members, rank, fresh) -> `splitft.adapters.United`, for one layer.

    `key` is (block, target); `members` are pairs of (weight, `Factors`) whose weights sum to 1; `rank` is the
    rank to aim for, and another one is cut down or grown afterwards; `fresh` makes new directions.
    """
    trains: str = "AB"
    """Factors that are trained: `AB` or `B`."""
    up: str = "AB"
    """Factors that a client sends after a round: those it trains, or `A` alone if it keeps its own B."""
    down: str = "AB"
    """Factors that it receives: those it sent, or none if all begin each round with fresh ones."""
    folds: bool = False
    """True if a part of the mean joins the frozen base, which travels down too."""
    full_rank: bool = False
    """True if the global factors keep the full rank R whatever the cuts, lower ranks training a part."""
    equal_ranks: bool = False
    """True if all members of a layer must have the same rank."""
    best_fit: bool = False
    """True if a lower rank gets the best approximation of B A, instead of the first rows of A."""
    keeps_axes: bool = False
    """True if a number of a factor means the same from round to round.

    Moments of the local optimizer, and what rounding left out of an upload, are then kept across rounds.
    """
    bounded: bool = False
    """True if the result moves no further than the members' factors, so that clipping these bounds it."""
    dora: bool = False
    """True if it averages DoRA's magnitudes beside A and B."""
    withstands: Callable[[int], int] | None = None
    """Most hostile members, of n, that cannot move the result away from the others' (its breakdown point).

    None if one member can move the result anywhere. A layer's `members` then have equal weights.
    """
    takes_hostile: bool = False
    """True if `unite` has a fifth argument: the number of hostile members to withstand."""
    on_device: bool = False
    """True if `unite` computes wherever the members' factors are; else it is given them on the CPU."""
    select: Callable[..., Any] | Lazy | None = None
    """(members, hostile) -> the members to unite: pairs of (weight, full set), chosen by all their layers."""

    def __post_init__(self) -> None:
        fits = self.trains in ("AB", "B") and self.up in (self.trains, self.trains.removesuffix("B") or "B")
        fits = fits and self.down in (self.up, "" if self.folds else self.up)
        if not fits or (self.down != "AB" and not self.full_rank):
            raise PluginError(
                f"an aggregation rule that trains {self.trains!r}, sends {self.up!r} up and {self.down!r} "
                "down cannot be run: trains is AB or B; up is trains, or A of AB; down is up, or empty if "
                "the rule folds; and a rule that does not send AB down has full_rank"
            )

    @property
    def keeps_own_b(self) -> bool:
        """True if a trained B stays with its client (FedSA-LoRA)."""
        return "B" in self.trains and "B" not in self.up

    @property
    def steps_on_server(self) -> bool:
        """True if a server optimizer fits: the next factors go on from the last and are all of the mean."""
        return self.keeps_axes and not self.folds


def _fewer_than_half(members: int) -> int:
    return max(0, (members - 1) // 2)


def _two_fewer_than_half(members: int) -> int:
    return max(0, (members - 3) // 2)


RULES: Registry[Rule] = Registry(
    "aggregation rule",
    "splitft.rules",
    {
        "factors": Rule(
            Lazy("splitft.adapters.aggregators:average_factors"),
            equal_ranks=True,
            keeps_axes=True,
            bounded=True,
            dora=True,
            on_device=True,
        ),
        "zero-pad": Rule(
            Lazy("splitft.adapters.aggregators:zero_pad"),
            keeps_axes=True,
            bounded=True,
            dora=True,
            on_device=True,
        ),
        "svd": Rule(
            Lazy("splitft.adapters.aggregators:best_products"), best_fit=True, dora=True, on_device=True
        ),
        "stack": Rule(
            Lazy("splitft.adapters.aggregators:stack_factors"),
            down="",
            folds=True,
            full_rank=True,
            on_device=True,
        ),
        "exact": Rule(
            Lazy("splitft.adapters.aggregators:average_with_residual"),
            folds=True,
            full_rank=True,
            keeps_axes=True,
            on_device=True,
        ),
        "ffa": Rule(
            Lazy("splitft.adapters.aggregators:average_b"),
            trains="B",
            up="B",
            down="B",
            full_rank=True,
            keeps_axes=True,
            bounded=True,
            on_device=True,
        ),
        "fedsa": Rule(
            Lazy("splitft.adapters.aggregators:average_a"),
            up="A",
            down="A",
            full_rank=True,
            keeps_axes=True,
            on_device=True,
        ),
        "median": Rule(
            Lazy("splitft.adapters.robust_aggregators:coordinate_median"),
            best_fit=True,
            dora=True,
            withstands=_fewer_than_half,
        ),
        "trimmed-mean": Rule(
            Lazy("splitft.adapters.robust_aggregators:trimmed_mean"),
            best_fit=True,
            dora=True,
            withstands=_fewer_than_half,
            takes_hostile=True,
        ),
        "krum": Rule(
            Lazy("splitft.adapters.robust_aggregators:mean_of_selected"),
            best_fit=True,
            dora=True,
            withstands=_two_fewer_than_half,
            select=Lazy("splitft.adapters.robust_aggregators:nearest_members"),
        ),
    },
)


def rules_where(fact: Callable[[Rule], bool], label: Callable[[str], str] = str) -> str:
    """Return the names of the rules for which a fact is true, for messages: `factors, zero-pad or svd`."""
    names = [label(name) for name, rule in RULES.items() if fact(rule)]
    return " or ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)
