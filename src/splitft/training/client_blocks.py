"""The blocks [0, k) of a client, and the factors on them.

    known     factors at the global ranks, private and personal ones included: the start of each round
    folded    what aggregation has added to the frozen base of these blocks
    slot      factors in the forward pass: trained at this client's ranks, or all of `known`

`client.py` holds the conversation with the server; here are its effects on blocks and factors: a cut that
moves, a round that begins and ends, global factors that arrive, a checkpoint that is restored.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from splitft.adapters import AdapterState, add_folded, attach
from splitft.data.text import Batch
from splitft.errors import ProtocolError
from splitft.geometry import Plan, Span
from splitft.model import CPU, Model, Segment, pack
from splitft.privacy.defence import Defence
from splitft.training.micro_batch import MicroBatch
from splitft.training.ranks import RankPolicy

SLOT = "own"
"""The one set of factors that a client has."""


class ClientBlocks:
    """The blocks of one client and their factors, over a whole run."""

    def __init__(
        self,
        name: str,
        model: Model,
        plan: Plan,
        ranks: RankPolicy,
        defence: Defence,
        device: torch.device = CPU,
    ) -> None:
        """Load the client's blocks of the model to a device. Raises ModelError if that is impossible."""
        self.name, self.plan = name, plan
        self._ranks, self._defence = ranks, defence
        self.segment: Segment = model.at("clients").segment(
            plan.client, embedding=True, head=plan.labels == "client", device=device
        )
        self.bank = attach(
            self.segment.blocks,
            ranks.lora.targets,
            ranks.scale,
            model.dtype,
            ranks.gain,
            self.segment.device_of,
        )
        self._dtype = torch.promote_types(model.dtype, torch.float32)
        sizes = {key: size for key, size in self.bank.sizes.items() if key[0] in plan.client}
        self._known, self._folded = ranks.start(sizes, self._dtype), AdapterState()
        self.bank.put(SLOT, self._known)

    def move(self, cut: int, adapters: AdapterState, folded: AdapterState) -> AdapterState:
        """Move to this cut with the factors of new blocks; return personal factors of blocks given up.

        Raises GeometryError or ProtocolError, and changes nothing, if the cut or the factors do not fit.
        """
        plan = Plan(cut, self.plan.blocks, self.plan.labels)
        given_up = self.own().within(self.plan.client.minus(plan.client))
        known = self._known.updated(adapters)
        missing = {block for block, _ in self.bank.sizes if block in plan.client} - set(known.ranks())
        if missing:
            raise ProtocolError(f"no factors came for block {min(missing)}, which the new cut brings here")
        self.segment.resize(plan.client)
        self.plan = plan
        self._known = known.within(plan.client)
        self._folded = self._folded.updated(folded).within(plan.client)
        return given_up

    def train(self, round: int) -> Mapping[tuple[int, str, str], nn.Parameter]:
        """Load the factors to train in this round; return them by block, target and half."""
        ranks = self._ranks.of(self.plan.cut, self.name)
        trained, rest = self._ranks.split_trained(self._known, ranks, round)
        self.bank.put(SLOT, trained, rest, self._folded, self._ranks.sharing.trains)
        return self.bank.parameters(SLOT)

    def trained(self) -> AdapterState:
        """Return the trained factors that leave the client; keep the others."""
        trained, whole = self.bank.take(SLOT), self.bank.take(SLOT, with_rest=True)
        self._known = self._known.updated(whole.within(self._private))
        if self._ranks.keeps_own:
            self._known = whole.select("B").fill_from(self._known)
        return trained.within(self.plan.client.minus(self._private)).select(self._ranks.sharing.up)

    def install(self, round: int, adapters: AdapterState, folded: AdapterState) -> None:
        """Load the aggregated factors. Raises ProtocolError if they are not those of the client's blocks."""
        shared = self.plan.client.minus(self._private)
        sizes = {key: size for key, size in self.bank.sizes.items() if key[0] in shared}
        down = self._ranks.sharing.down
        if set(adapters.keys()) != (set(sizes) if down else set()):
            raise ProtocolError(f"{self.name}: the global adapters are not those of {self.plan.client}")
        new = adapters.fill_from(self._known) if down else self._ranks.start(sizes, self._dtype, round)
        self._known = self.private().union(new)
        self._folded = add_folded(self._folded, folded)
        self.bank.put(SLOT, self._known, folded=self._folded)

    def join(
        self, cut: int, round: int, adapters: AdapterState, folded: AdapterState, personal: AdapterState
    ) -> None:
        """Hold the blocks before this cut with the factors that they have after a round.

        Factors that are not sent are computed here: all before round 1, later those that the rule leaves out.
        `personal` are those that never leave, as this client had them, and take the place of computed ones.
        Raises ProtocolError if other factors arrive.
        """
        self.plan = Plan(cut, self.plan.blocks, self.plan.labels)
        self.segment.resize(self.plan.client)
        sizes = {key: size for key, size in self.bank.sizes.items() if key[0] in self.plan.client}
        down = self._ranks.sharing.down if round else ""
        computed = self._ranks.start(sizes, self._dtype, 0 if self._ranks.sharing.down else round)
        due = {key for key in sizes if key[0] not in self._private}
        if set(adapters.keys()) != (due if down else set()):
            raise ProtocolError(f"{self.name}: the global adapters are not those of {self.plan.client}")
        known = computed.updated(adapters.fill_from(computed))
        self._known = known.updated(personal.within(self.plan.client).fill_from(known))
        self._folded = folded
        self.bank.put(SLOT, self._known, folded=folded)

    def restore(self, cut: int, known: AdapterState, folded: AdapterState) -> None:
        """Restore a checkpoint; `known` are all factors of the client's blocks, private ones included."""
        self.plan = Plan(cut, self.plan.blocks, self.plan.labels)
        self.segment.resize(self.plan.client)
        self._known, self._folded = known, folded
        self.bank.put(SLOT, known, folded=folded)

    def largest_update(self) -> tuple[float, tuple[int, str] | None]:
        """Return the largest update of a layer relative to its frozen weight, and the layer."""
        return self.bank.largest_update(SLOT)

    def private(self) -> AdapterState:
        """Return the factors of the blocks that this client never uploads."""
        return self._known.within(self._private)

    def own(self) -> AdapterState:
        """Return the personal factors B, which never leave; none by most rules."""
        return self._known.select("B") if self._ranks.keeps_own else AdapterState()

    def personal(self) -> AdapterState:
        """Return all factors that never leave: those of private blocks, and the personal B of the others."""
        return self.own().updated(self.private())

    def run(self, batch: Batch, step: MicroBatch | None = None, base: bool = False) -> torch.Tensor:
        """Run tokens through the client's blocks -> (B, T, D); with `base`, without the factors.

        `step` is the micro-batch of a training step, which fixes its dropout.
        """
        masks = () if step is None else self._ranks.dropout(self.name, step.step, step.number, batch.lengths)
        with self.bank.routed([(None if base else SLOT, len(batch.lengths))], masks):
            return self.segment.run(batch.tokens, self.plan.client)

    def hidden(self, batch: Batch, *place: object, step: MicroBatch | None = None) -> torch.Tensor:
        """Run tokens through the client's blocks and its defences -> (N, D); `place` fixes the noise."""

        def base(public: Batch) -> torch.Tensor:
            return pack(self.run(public, base=True), public.lengths)

        own = pack(self.run(batch, step), batch.lengths)
        return self._defence.hidden(own, self.plan.cut, base, *place)

    @property
    def _private(self) -> Span:
        return Span(0, min(self._defence.privacy.private_blocks, self.plan.cut))
