"""Which rank a block's adapter has, and for whom; and where global factors become a party's own.

    global factors --fitted--> a client's own at its ranks (lower next to its cut) --trained--> aggregated

Both sides compute this from the same specification, so ranks never travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from splitft.adapters import AdapterState, Fresh, fit_all
from splitft.geometry import ranks_by_block
from splitft.specs import LoraSpec


@dataclass(frozen=True)
class Ranks:
    """The rank rule of a run (SplitFT, arXiv 2604.26388: lowered on both sides of the cut)."""

    lora: LoraSpec
    blocks: int
    """L."""
    rule: str
    """Aggregation rule, which also says how factors are cut down."""
    seed: int

    @property
    def scale(self) -> float:
        """alpha / rank, the same for every layer whatever its own rank."""
        return self.lora.alpha / self.lora.rank

    def initial(self) -> dict[int, int]:
        """Rank by block before the first round."""
        return dict.fromkeys(range(self.blocks), self.lora.rank)

    def of(self, cut: int) -> dict[int, int]:
        """Rank by block of a client with this cut."""
        lora = self.lora
        ranks = ranks_by_block(cut, self.blocks, lora.rank, lora.rank_at_cut, lora.cut_span, lora.cut_sides)
        return dict(enumerate(ranks))

    def shared(self, cuts: Iterable[int]) -> dict[int, int]:
        """Rank by block of server adapters that clients with these cuts share: lowered next to any cut."""
        return _combined(min, [self.of(cut) for cut in cuts])

    def united(self, cuts: Iterable[int]) -> dict[int, int]:
        """Rank by block of the global factors: the highest that any client brings."""
        return _combined(max, [self.of(cut) for cut in cuts])

    def fitted(self, state: AdapterState, ranks: Mapping[int, int], round: int) -> AdapterState:
        """Global factors at these ranks, for this round; equal for whoever computes it."""
        return fit_all(state, ranks, self.rule, Fresh(self.seed, salt=round))


def _combined(choose: Callable[[Iterable[int]], int], patterns: list[dict[int, int]]) -> dict[int, int]:
    return {block: choose(pattern[block] for pattern in patterns) for block in patterns[0]}
