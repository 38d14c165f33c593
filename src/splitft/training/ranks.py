"""LoRA ranks by block, client and cut, and the factors that each party trains at them.

    global factors --split_trained--> factors at a client's ranks (lower next to its cut) --training--> upload
                   --------------> rows beyond those ranks ----------> validate_upload --> aggregation

Both sides compute ranks from the same specification, so ranks are never sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from splitft.adapters import AdapterState, Factors, Fresh, fit_all, initial_state
from splitft.adapters.dropout import DropoutRows
from splitft.adapters.state import Key
from splitft.errors import ProtocolError
from splitft.geometry import ranks_by_block
from splitft.specs import LoraSpec
from splitft.specs.rules import RULES, Rule


@dataclass(frozen=True)
class RankPolicy:
    """Rank rule of a run (SplitFT, arXiv 2604.26388: ranks are lowered on both sides of the cut)."""

    lora: LoraSpec
    blocks: int
    """L."""
    rule: str
    """Name of the aggregation rule, which also says how factors are reduced to a lower rank."""
    seed: int
    by_client: Mapping[str, int] = field(default_factory=dict)
    """R of each client, where clients differ."""

    @property
    def scale(self) -> float:
        """Scale of B A as stored, sent and averaged: alpha / R, with rsLoRA alpha / sqrt(R)."""
        rank = self.lora.rank
        return self.lora.alpha / (math.sqrt(rank) if self.lora.scaling == "rslora" else rank)

    def gain(self, rank: int) -> float:
        """Scale of a layer while it is trained at this rank, over `scale`.

        rsLoRA (Kalajdzievski 2023, arXiv 2312.03732) trains a layer of rank r at alpha / sqrt(r). A rule
        must average updates, not factors of different scales, so B is divided by the gain when training
        begins and multiplied by it when training ends: zero-pad then adds rows of the same scale, and svd
        takes the mean of the true products.
        """
        return math.sqrt(self.lora.rank / rank) if self.lora.scaling == "rslora" else 1.0

    @property
    def sharing(self) -> Rule:
        """The aggregation rule: the factors that it trains, sends and folds."""
        return RULES[self.rule]

    @property
    def keeps_own(self) -> bool:
        """True if a trained factor stays with its client (FedSA-LoRA's B)."""
        return self.sharing.keeps_own_b

    def initial(self) -> dict[int, int]:
        """Return the rank of each block before the first round."""
        return dict.fromkeys(range(self.blocks), self.lora.rank)

    def part_sent(self, state: AdapterState) -> AdapterState:
        """Return the part of global factors that is sent to a client; it has or can compute the rest."""
        return state.select(self.sharing.down) if self.sharing.down else AdapterState()

    def start(self, sizes: Mapping[Key, tuple[int, int]], dtype: torch.dtype, round: int = 0) -> AdapterState:
        """Return untrained factors, equal on both sides: A drawn from seed and round, B zero."""
        return initial_state(
            sizes, self.initial(), self.seed, dtype, salt=round, dora=self.lora.method == "dora"
        )

    def of(self, cut: int, client: str = "") -> dict[int, int]:
        """Return the rank of each block for a client with this cut."""
        lora = self.lora
        rank = self.by_client.get(client, lora.rank)
        at_cut = None if lora.rank_at_cut is None else min(rank, lora.rank_at_cut)
        ranks = ranks_by_block(cut, self.blocks, rank, at_cut, lora.cut_span, lora.cut_sides)
        return dict(enumerate(ranks))

    def shared(self, cuts: Iterable[int]) -> dict[int, int]:
        """Return the rank of each block of shared server adapters: lowered next to any of these cuts."""
        return _combined(min, [self.of(cut) for cut in cuts])

    def global_ranks(self, cuts: Mapping[str, int]) -> dict[int, int]:
        """Return the rank of each block of the global factors: the highest of any client, by some rules R."""
        if self.sharing.full_rank:
            return self.initial()
        return _combined(max, [self.of(cut, client) for client, cut in cuts.items()])

    def split_trained(
        self, state: AdapterState, ranks: Mapping[int, int], round: int
    ) -> tuple[AdapterState, AdapterState]:
        """Split global factors into those to train at these ranks in this round and the rows beyond.

        Client and server compute the same result.
        """
        if not self.sharing.full_rank:
            return fit_all(state, ranks, self.rule, Fresh(self.seed, salt=round)), AdapterState()
        trained = {key: factors.first(ranks[key[0]]) for key, factors in state.items()}
        rest = {key: factors.beyond(ranks[key[0]]) for key, factors in state.items()}
        return AdapterState(trained), AdapterState({key: one for key, one in rest.items() if one.rank})

    def dropout(
        self, client: str, step: int, micro_batch: int, lengths: Sequence[int]
    ) -> tuple[DropoutRows, ...]:
        """Return what fixes the dropout of a client's micro-batch at every layer; empty without dropout."""
        p = self.lora.dropout
        if not p:
            return ()
        return (DropoutRows(p, self.seed, client, step, micro_batch, len(lengths), max(lengths)),)

    def validate_upload(
        self, client: str, sent: AdapterState, before: AdapterState, cut: int
    ) -> AdapterState:
        """Return the factors that a client sent, completed with the rows of `before` that it did not train.

        `before` are the global factors. Raises ProtocolError if they are not those that the client trains.
        """
        unknown = {key for key in sent if key not in before or key[0] >= cut}
        if unknown:
            block, target = min(unknown)
            raise ProtocolError(f"{client} of cut {cut} sends factors of block {block} {target}")
        ranks = self.of(cut, client)
        return AdapterState({
            key: self._completed(client, key, sent[key], before[key], ranks[key[0]]) for key in sent
        })  # fmt: skip

    def factors_at_start(self, state: AdapterState, cut: int, round: int, client: str = "") -> AdapterState:
        """Return the global factors as a client and the server for it began to train them."""
        return state if self.sharing.full_rank else self.split_trained(state, self.of(cut, client), round)[0]

    def _completed(self, client: str, key: Key, sent: Factors, before: Factors, rank: int) -> Factors:
        expected = before.first(min(rank, before.rank)).select(self.sharing.up)
        widths = (expected.A.shape[1], expected.B.shape[0])
        if sent.rank != rank or (sent.A.shape[1], sent.B.shape[0]) != widths:
            raise ProtocolError(
                f"{client} sends factors {tuple(sent.B.shape)} x {tuple(sent.A.shape)} for block {key[0]} "
                f"{key[1]}; due was rank {rank} over {widths[1]} and {widths[0]}"
            )
        if (sent.magnitude is None) != (expected.magnitude is None):
            which = "no magnitude" if sent.magnitude is None else "a magnitude"
            raise ProtocolError(f"{client} sends {which} for block {key[0]} {key[1]}; see lora.method")
        if not self.sharing.full_rank:
            return sent
        rest = before.beyond(rank)
        A = torch.cat([sent.A, rest.A]) if sent.A.shape[1] else before.A
        B = torch.cat([sent.B, rest.B], 1) if sent.B.shape[0] else before.B.new_empty(0, before.rank)
        return Factors(A, B)


def _combined(choose: Callable[[Iterable[int]], int], patterns: list[dict[int, int]]) -> dict[int, int]:
    """Combine the ranks of each block."""
    return {block: choose(pattern[block] for pattern in patterns) for block in patterns[0]}
