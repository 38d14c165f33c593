"""The blocks [k, L) on the server, and the factors on them: one slot for each client, or one for all.

    per-client        slot of its own for each participant (SplitFed v1, arXiv 2004.12088)
    shared            one slot, one optimizer step on all clients' batches (SplitLoRA, arXiv 2407.00952)
    shared-in-turn    one slot, an optimizer step after each client's batch (SplitFed v2)

`server.py` holds the conversation with the clients; here are its effects on blocks, factors and optimizers.
With `shared`, the loss is that of the concatenated batch, sum_i M_i loss_i / sum_i M_i over the M_i labelled
tokens of each client's step, and the optimizer steps when all participants have completed theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from splitft.adapters import AdapterState, LocalOptimizer, attach, moments_within, step_together
from splitft.geometry import Plan, Span
from splitft.model import CPU, Model, Segment, checkpoint_blocks
from splitft.specs import SplitSpec, TrainingSpec
from splitft.training.client_record import ClientStates
from splitft.training.parking import parking_on
from splitft.training.ranks import RankPolicy

GLOBAL, SHARED = "=global", "=shared"
"""Slots of the aggregated factors and of those that all clients train; no client's name begins with `=`."""


class ServerBlocks:
    """The server's blocks and their factors, over a whole run."""

    def __init__(
        self,
        model: Model,
        deepest: Span,
        ranks: RankPolicy,
        split: SplitSpec,
        training: TrainingSpec,
        devices: Sequence[torch.device] = (CPU,),
    ) -> None:
        """Load the blocks `deepest` to these devices, and the head if labels are on the server."""
        self._ranks, self._split, self._training = ranks, split, training
        self.segment: Segment = model.at("server").segment(
            deepest, head=split.labels == "server", device=devices
        )
        self.bank = attach(
            self.segment.blocks,
            ranks.lora.targets,
            ranks.scale,
            model.dtype,
            ranks.gain,
            self.segment.device_of,
        )
        if training.checkpoint_blocks:
            checkpoint_blocks(self.segment.blocks, self.bank.recorded)
        self._dtype = torch.promote_types(model.dtype, torch.float32)
        self.cuts: dict[str, int] = {}
        """k of every client."""
        self._participants: dict[str, int] = {}  # those of the round, with their cuts
        self._optimizers: dict[str, LocalOptimizer] = {}  # by slot
        self._finished: dict[str, int] = {}  # shared factors: weights of completed steps
        self.parking = parking_on(self.segment.devices)
        """Room for the factors and moments of the participants on the devices."""
        self.client_states = ClientStates(per_client=not self.shared)
        """State of clients across rounds."""

    @property
    def shared(self) -> bool:
        """True if all clients train one slot."""
        return self._split.server_adapters != "per-client"

    def initial(self) -> AdapterState:
        """Return the global factors before training, over all L blocks."""
        return self._ranks.start(self.bank.sizes, self._dtype)

    def place(self, cuts: Mapping[str, int]) -> int:
        """Hold the blocks that these cuts leave to the server; return bytes of weights read."""
        blocks = self.segment.shape.blocks
        for cut in cuts.values():
            Plan(cut, blocks, self._split.labels)
        self.cuts = dict(cuts)
        return self.segment.resize(Span(min(cuts.values()), blocks))

    def start(
        self, number: int, participants: Sequence[str], state: AdapterState, folded: AdapterState | None
    ) -> None:
        """Load the round's factors into the participants' slots, each with a new optimizer."""
        blocks = self.segment.shape.blocks
        self._participants = {name: self.cuts[name] for name in participants}
        self._finished, self._optimizers = {}, {}
        if self.shared:
            cuts = list(self._participants.values())
            slots = {SHARED: (Span(min(cuts), blocks), self._ranks.shared(cuts))}
        else:
            slots = {
                name: (Span(cut, blocks), self._ranks.of(cut, name))
                for name, cut in self._participants.items()
            }
        for slot, (span, ranks) in slots.items():
            start = self.client_states.personal(slot, state.within(span))
            trained, rest = self._ranks.split_trained(start, ranks, number)
            self.bank.put(slot, trained, rest, folded, self._ranks.sharing.trains)
            moments = moments_within(self.client_states.moments.get(slot, {}), span)
            self._optimizers[slot] = LocalOptimizer(
                self.bank.parameters(slot), self._training, moments, self._ranks.lora.lr_ratio, number
            )
            self.parking.add(slot, self.bank, slot, self._optimizers[slot])

    def step(self, weights: Mapping[str, int]) -> None:
        """Step the optimizers of clients that have completed a step, given the weights of their losses."""
        if self._split.server_adapters == "per-client":
            step_together([self._optimizers[client] for client in weights])
            for client in weights:
                self.parking.rest(client)
        elif self._split.server_adapters == "shared-in-turn":
            if weights:
                self._optimizers[SHARED].step()
        else:
            # participants still to finish have added nothing to the gradients yet
            self._finished.update(weights)
            if self._finished.keys() >= self._participants.keys():
                self._optimizers[SHARED].step(divide_by=sum(self._finished.values()))
                self._finished = {}

    def trained(self, client: str) -> AdapterState:
        """Return the factors of blocks [k, L) trained for one client."""
        span = Span(self._participants[client], self.segment.shape.blocks)
        return self.bank.take(self.slot(client), with_rest=True).within(span)

    def finish(self) -> None:
        """End the round: keep moments and personal factors where the run keeps them, drop the slots."""
        if self._training.optimizer_state == "keep" or self._training.order == "in-turn":
            self.client_states.moments.update({slot: one.moments() for slot, one in self._optimizers.items()})
        for slot in self._optimizers:
            if self._ranks.keeps_own:
                self.client_states.own[slot] = self.bank.take(slot, with_rest=True).select("B")
            self.bank.drop(slot)
        self.parking.clear()
        self._optimizers, self._participants = {}, {}

    def install(self, state: AdapterState, folded: AdapterState | None) -> None:
        """Load the aggregated factors to evaluate with, for each client with its personal ones."""
        if not self._ranks.keeps_own:
            self.bank.put(GLOBAL, state.within(self.segment.span), folded=folded)
            return
        for client, cut in self.cuts.items():
            held = state.within(Span(cut, self.segment.shape.blocks))
            self.bank.put(f"{GLOBAL}/{client}", self.client_states.personal(client, held))

    def forget(self, client: str) -> None:
        """Drop what the client's current step has added to the gradients of its own slot."""
        if client in self._optimizers:
            self._optimizers[client].forget()
            self.parking.rest(client)

    def leave(self, client: str) -> None:
        """Drop a participant that takes no further part in the round, with its own slot."""
        self._participants.pop(client, None)
        if self._optimizers.pop(client, None) is not None:
            self.bank.drop(client)
            self.parking.remove(client)

    def slot(self, client: str) -> str:
        """Return the slot that the client's rows train."""
        return SHARED if self.shared else client

    def evaluation_slot(self, client: str) -> str:
        """Return the slot that the client's rows are evaluated with."""
        return f"{GLOBAL}/{client}" if self._ranks.keeps_own else GLOBAL
