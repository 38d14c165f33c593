"""Bound each participant's update by the median of all: `aggregate.norm_bound`.

    update_i = its factors after the round - the factors it began with      by layer, A and B
    size_i   = root mean square of the changed numbers                      the same for every rank and cut
    typical  = median of this round's sizes and the last rounds' medians    (of two in the middle, the lower)
    bounded  = start_i + update_i * min(1, norm_bound * typical / size_i)

The norm of factors is bounded, not that of products B A: A times 1e9 and B times 1e-9 have an ordinary
product, but a rule that averages A and B would be ruined by them. Bounded factors have a bounded product.

A participant that trains otherwise than the rest is not disturbed below the bound: nothing is changed then,
not by a bit. The median holds while fewer than half of its numbers come from hostile participants. With three
or more, that is so from the first round on. One or two participants have nobody to be compared with: they are
bounded from the third round on, by their own last rounds, so that only sudden jumps are caught.

Not bounded: the server's blocks where all clients share them (`split.server_adapters`), which take the
server's own steps; runs with `privacy.updates.clip_norm`, which has a bound of its own, that others' updates
may not move.

Scaling updates down to a norm against scaled attacks: Sun et al. 2019, https://arxiv.org/abs/1911.07963.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from splitft.adapters import AdapterState
from splitft.adapters.state import Factors
from splitft.geometry import Span
from splitft.tracking.events import UpdatesBounded
from splitft.training.ranks import RankPolicy

REMEMBERED = 4
"""Rounds whose medians are remembered."""
LEAST = 3
"""Fewest numbers that a median is taken of."""

FullSets = Mapping[str, tuple[float, AdapterState]]
"""Weight and full set of each participant."""


@dataclass(frozen=True)
class BoundedUpdates:
    """The participants' sets of a round, none of whose updates is far larger than the others'."""

    sets: FullSets
    medians: tuple[float, ...] = ()
    """Medians of the last rounds, this one included."""
    event: UpdatesBounded | None = None
    """Who was bounded; None if nobody was."""


@dataclass(frozen=True)
class NormBound:
    """The bound of a run's updates."""

    factor: float | None
    """`aggregate.norm_bound`; None for no bound."""
    ranks: RankPolicy
    shared_server: bool
    """True if all clients share the server's adapters."""

    def apply(
        self,
        number: int,
        before: AdapterState,
        cuts: Mapping[str, int],
        sets: FullSets,
        medians: Sequence[float],
    ) -> BoundedUpdates:
        """Scale the updates of round `number` down to the bound; `before` are its global factors."""
        if self.factor is None:
            return BoundedUpdates(sets, tuple(medians))
        starts = self._starts(number, before, cuts, sets)
        sizes = {name: self._size(start, sets[name][1]) for name, start in starts.items()}
        finite = [size for size in sizes.values() if math.isfinite(size)]
        if not finite:
            return BoundedUpdates(sets, tuple(medians))
        known = [*finite, *medians]
        typical = statistics.median_low(known) if len(known) >= LEAST else 0.0
        limit = self.factor * typical if typical > 0 else math.inf
        scale = {name: limit / size for name, size in sizes.items() if limit < size < math.inf}
        bounded = {
            name: (weight, self._scaled(starts[name], one, scale[name]) if name in scale else one)
            for name, (weight, one) in sets.items()
        }
        event = UpdatesBounded(round=number, scale=scale, limit=limit, typical=typical) if scale else None
        median = statistics.median_low([min(size, limit) for size in finite])
        return BoundedUpdates(bounded, (*medians, median)[-REMEMBERED:], event)

    def _starts(
        self, number: int, before: AdapterState, cuts: Mapping[str, int], sets: FullSets
    ) -> dict[str, AdapterState]:
        """Return the factors that each participant began with, of the layers that it alone has trained."""
        by_ranks: dict[tuple[int, ...], AdapterState] = {}
        starts = {}
        for name in sets:
            pattern = tuple(self.ranks.of(cuts[name], name).values())
            if pattern not in by_ranks:
                by_ranks[pattern] = self.ranks.factors_at_start(before, cuts[name], number, name)
            alone = Span(0, cuts[name]) if self.shared_server else range(self.ranks.blocks)
            trained = sets[name][1]
            starts[name] = AdapterState({
                key: one for key, one in by_ranks[pattern].within(alone).items() if key in trained
            })  # fmt: skip
        return starts

    def _size(self, start: AdapterState, trained: AdapterState) -> float:
        """Return the root mean square of the changes of all factors that clients send."""
        total, numbers = 0.0, 0
        for key, old in start.items():
            for before, after in _pairs(old, trained[key], self.ranks.sharing.up):
                total += float((after.double() - before.double()).square().sum())
                numbers += after.numel()
        return (
            math.sqrt(total / numbers) if numbers and math.isfinite(total) else (math.inf if numbers else 0.0)
        )

    def _scaled(self, start: AdapterState, trained: AdapterState, share: float) -> AdapterState:
        """Return the start and this share of the update."""

        def toward(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
            wide = before.double()
            return (wide + (after.double() - wide) * share).to(after.dtype)

        up, scaled = self.ranks.sharing.up, {}
        for key, old in start.items():
            new = trained[key]
            scaled[key] = replace(
                new,
                A=toward(old.A, new.A) if "A" in up else new.A,
                B=toward(old.B, new.B) if "B" in up else new.B,
                magnitude=None if new.magnitude is None else toward(_magnitude(old, new), new.magnitude),
            )
        return trained.updated(AdapterState(scaled))


def _pairs(old: Factors, new: Factors, names: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the tensors of these names before and after."""
    pairs = [(old.A, new.A)] if "A" in names else []
    pairs += [(old.B, new.B)] if "B" in names else []
    pairs += [(_magnitude(old, new), new.magnitude)] if new.magnitude is not None else []
    return pairs


def _magnitude(old: Factors, new: Factors) -> torch.Tensor:
    """Return DoRA's magnitudes before the round; zero where there were none."""
    return new.B.new_zeros(1, new.B.shape[0]) if old.magnitude is None else old.magnitude
