"""What a client holds: its blocks [0, k), and the factors on them.

    known     factors at the global ranks, its private ones and its own among them     what rounds begin from
    folded    what aggregation has added to the frozen base of these blocks
    slot      what takes part in the forward pass: trained at this client's ranks, or all of `known`

`client.py` is the conversation, and this what it is about: a cut that moves, a round that begins and ends,
global factors that arrive, a checkpoint that is read.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from splitft.adapters import AdapterState, add_folded, attach
from splitft.data.text import Batch
from splitft.errors import ProtocolError
from splitft.geometry import Plan, Span
from splitft.model import Model, Segment
from splitft.training.ranks import RankPolicy

SLOT = "own"
"""The one set of factors that a client has."""


class ClientBlocks:
    """The blocks of one client and their factors, over a whole run."""

    def __init__(self, name: str, model: Model, plan: Plan, ranks: RankPolicy, private_blocks: int) -> None:
        """Load the client's blocks of the model. Raises ModelError if that cannot be."""
        self.name, self.plan = name, plan
        self._ranks, self._private_blocks = ranks, private_blocks
        self.segment: Segment = model.segment(plan.client, embedding=True, head=plan.labels == "client")
        self.bank = attach(self.segment.blocks, ranks.lora.targets, ranks.scale, model.dtype, ranks.gain)
        self._dtype = torch.promote_types(model.dtype, torch.float32)
        sizes = {key: size for key, size in self.bank.sizes.items() if key[0] in plan.client}
        # the factors of the blocks held here, at the global ranks, and what is folded into their base
        self._known, self._folded = ranks.start(sizes, self._dtype), AdapterState()
        self.bank.put(SLOT, self._known)

    def move(self, cut: int, adapters: AdapterState, folded: AdapterState) -> AdapterState:
        """Hold the blocks before this cut, with what came of them; returns own factors of blocks given up.

        Raises GeometryError or ProtocolError, and changes nothing, if that cannot be.
        """
        plan = Plan(cut, self.plan.blocks, self.plan.labels)
        given_up = self.own().within(self.plan.client.minus(plan.client))
        known = self._known.updated(adapters)
        lacking = {block for block, _ in self.bank.sizes if block in plan.client} - set(known.ranks())
        if lacking:
            raise ProtocolError(f"no factors came for block {min(lacking)}, which the new cut brings here")
        self.segment.resize(plan.client)
        self.plan = plan
        self._known = known.within(plan.client)
        self._folded = self._folded.updated(folded).within(plan.client)
        return given_up

    def train(self, round: int) -> Mapping[tuple[int, str, str], nn.Parameter]:
        """Take up the factors to train in this round; returns them by block, target and half."""
        ranks = self._ranks.of(self.plan.cut, self.name)
        trained, rest = self._ranks.split_trained(self._known, ranks, round)
        self.bank.put(SLOT, trained, rest, self._folded, self._ranks.sharing.trains)
        return self.bank.parameters(SLOT)

    def trained(self) -> AdapterState:
        """What the round has made of the factors that leave; the others are kept here."""
        trained, whole = self.bank.take(SLOT), self.bank.take(SLOT, whole=True)
        self._known = self._known.updated(whole.within(self._private))
        if self._ranks.keeps_own:
            self._known = whole.only("B").completed(self._known)
        return trained.within(self.plan.client.minus(self._private)).only(self._ranks.sharing.up)

    def install(self, round: int, adapters: AdapterState, folded: AdapterState) -> None:
        """Take the aggregated factors. Raises ProtocolError if they are not those of the blocks held here."""
        shared = self.plan.client.minus(self._private)
        sizes = {key: size for key, size in self.bank.sizes.items() if key[0] in shared}
        down = self._ranks.sharing.down
        if set(adapters.keys()) != (set(sizes) if down else set()):
            raise ProtocolError(f"{self.name}: the global adapters are not those of {self.plan.client}")
        news = adapters.completed(self._known)
        news = news if down else self._ranks.start(sizes, self._dtype, round)
        self._known = self.private().union(news)
        self._folded = add_folded(self._folded, folded)
        self.bank.put(SLOT, self._known, folded=self._folded)

    def join(self, cut: int, round: int, adapters: AdapterState, folded: AdapterState) -> None:
        """Hold the blocks before this cut as they are after a round, with what came of them.

        What does not travel is made here: all factors before round 1, later those that the rule leaves out.
        Raises ProtocolError if other factors came.
        """
        self.plan = Plan(cut, self.plan.blocks, self.plan.labels)
        self.segment.resize(self.plan.client)
        sizes = {key: size for key, size in self.bank.sizes.items() if key[0] in self.plan.client}
        down = self._ranks.sharing.down if round else ""
        made = self._ranks.start(sizes, self._dtype, 0 if self._ranks.sharing.down else round)
        if set(adapters.keys()) != (set(sizes) if down else set()):
            raise ProtocolError(f"{self.name}: the global adapters are not those of {self.plan.client}")
        self._known, self._folded = made.updated(adapters.completed(made)), folded
        self.bank.put(SLOT, self._known, folded=folded)

    def restore(self, cut: int, known: AdapterState, folded: AdapterState) -> None:
        """Hold what a checkpoint kept: the factors of the blocks before this cut, private ones too."""
        self.plan = Plan(cut, self.plan.blocks, self.plan.labels)
        self.segment.resize(self.plan.client)
        self._known, self._folded = known, folded
        self.bank.put(SLOT, known, folded=folded)

    def private(self) -> AdapterState:
        """Factors of the blocks that this client never uploads."""
        return self._known.within(self._private)

    def own(self) -> AdapterState:
        """The factors B that never leave, by rules that have such."""
        return self._known.only("B") if self._ranks.keeps_own else AdapterState()

    def run(self, batch: Batch, base: bool = False) -> torch.Tensor:
        """Tokens through the client's blocks -> (B, T, D); with `base` without the factors."""
        with self.bank.routed([(None if base else SLOT, len(batch.lengths))]):
            return self.segment.run(batch.tokens, self.plan.client)

    @property
    def _private(self) -> Span:
        return Span(0, min(self._private_blocks, self.plan.cut))
