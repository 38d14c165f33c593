"""The blocks [k, L) on the server, and the factors on them: one slot for each client, or one for all.

    per-client        slot of its own for each participant (SplitFed v1, arXiv 2004.12088)
    shared            one slot, one optimizer step on all clients' batches (SplitLoRA, arXiv 2407.00952)
    shared-in-turn    one slot, an optimizer step after each client's batch (SplitFed v2)
    shared-by-arrival one slot, an optimizer step whenever a client's step is complete; nobody waits

`server.py` holds the conversation with the clients; here are its effects on blocks, factors and optimizers.
With `shared`, the loss is that of the concatenated batch, sum_i M_i loss_i / sum_i M_i over the M_i labelled
tokens of each client's step, and the optimizer steps when all participants have completed theirs.

With `shared-by-arrival` several clients may be between forward and backward at once. A client's step runs on
a copy of the shared slot, made as the step begins. The gradient, which is that of the copy, is given to the
shared slot, which may have stepped meanwhile, and its optimizer steps (delayed gradients, as in asynchronous
SGD: Recht et al. 2011, arXiv 1106.5730).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import nn

from splitft.adapters import AdapterState, LocalOptimizer, attach, moments_within, step_together
from splitft.adapters.dropout import DropoutRows
from splitft.adapters.optimizer import ParameterKey
from splitft.geometry import Plan, Span
from splitft.model import CPU, Model, Segment, checkpoint_blocks, losses_and_gradients, sums_of_batches
from splitft.protocol import Activations, Message
from splitft.specs import SplitSpec, TrainingSpec
from splitft.training.batching import Group, backward_together, forward_together, group_by_length
from splitft.training.client_record import ClientStates
from splitft.training.common_step import CommonStep
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
        self.common = CommonStep(self._shared_parameters, ())
        """With `shared`, the step that all clients take together."""
        self._copies: set[str] = set()  # shared by arrival: clients with a copy, in the middle of a step
        self._counts: Counter[str] = Counter()  # and the steps that each has completed in this round
        self.parking = parking_on(self.segment.devices)
        """Room for the factors and moments of the participants on the devices."""
        self.client_states = ClientStates(per_client=not self.shared)
        """State of clients across rounds."""

    @property
    def shared(self) -> bool:
        """True if all clients train one slot."""
        return self._split.server_adapters != "per-client"

    @property
    def pipelined(self) -> bool:
        """True if groups fill a pipeline of several devices."""
        return len(self.segment.devices) > 1

    def close(self) -> None:
        """Do nothing: the blocks are in this process."""

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
        with_server = [name for name, cut in self._participants.items() if cut < blocks]
        self.common, self._optimizers = CommonStep(self._shared_parameters, with_server), {}
        self._counts.clear()
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

    @property
    def by_arrival(self) -> bool:
        """True if the shared slot steps whenever a client's step is complete."""
        return self._split.server_adapters == "shared-by-arrival"

    def begin(self, clients: Iterable[str]) -> None:
        """Note that steps of these clients begin, if they have not: from now on they see no other's step."""
        if not self.by_arrival:
            return
        for client in clients:
            if client not in self._copies:
                self.bank.copy(SHARED, client, Span(self._participants[client], self.segment.shape.blocks))
                self._copies.add(client)

    # --- passes -----------------------------------------------------------------------------------

    def groups(self, messages: Sequence[Activations]) -> list[list[Activations]]:
        """Group batches of similar length to run together."""
        return group_by_length(messages, self._split.group_tokens)

    def forward(self, messages: Sequence[Activations], training: bool) -> Group:
        """Run batches, one of each client, from the cuts to the end."""
        slot = self.slot if training else self.evaluation_slot
        if training:
            self.begin(message.client for message in messages)
            self.parking.work(message.client for message in messages)
        with torch.set_grad_enabled(training):
            return forward_together(self.segment, self.bank, self.cuts, slot, messages, self._dropout)

    def outputs(self, group: Group) -> dict[str, torch.Tensor]:
        """Return the hidden states of each client after the last block, (M, D)."""
        return {client: output.detach() for client, output in group.outputs.items()}

    def losses_and_gradients(self, group: Group) -> dict[str, tuple[float, torch.Tensor]]:
        """Return each client's mean loss and its gradient at the outputs, where labels are here."""
        results = losses_and_gradients(self.segment, list(group.labelled().values()))
        return dict(zip(group.messages, results, strict=True))

    def held_out_sums(self, group: Group) -> dict[str, tuple[float, int]]:
        """Return each client's summed loss and right predictions, where labels are here."""
        sums = sums_of_batches(self.segment, list(group.labelled().values()))
        return dict(zip(group.messages, sums, strict=True))

    def backward(
        self,
        group: Group,
        gradients: Mapping[str, torch.Tensor],
        weights: Mapping[str, int],
        retain_graph: bool,
    ) -> dict[str, torch.Tensor]:
        """Run backward from gradients at these clients' outputs; return those at their cuts."""
        shared = self._split.server_adapters == "shared"
        parts = [client for client in gradients if shared and group.messages[client].micro_batches > 1]
        with self.common.apart(parts[0]) if len(gradients) == len(parts) == 1 else nullcontext():
            return backward_together(group, gradients, weights, retain_graph)

    def step(self, weights: Mapping[str, int]) -> None:
        """Step the optimizers of clients that have completed a step, given the weights of their losses."""
        if self._split.server_adapters == "per-client":
            step_together([self._optimizers[client] for client in weights])
            for client in weights:
                self.parking.rest(client)
        elif self._split.server_adapters == "shared-in-turn":
            for client in weights:
                self._optimizers[SHARED].at(self._counts[client]).step()
                self._counts[client] += 1
        elif self.by_arrival:
            for client in weights:
                self.bank.hand_over(client, SHARED)
                self._optimizers[SHARED].at(self._counts[client]).step()
                self._counts[client] += 1
                self._drop_copy(client)
        else:
            for client, weight in weights.items():
                self.common.complete(client, weight)
            self._step_in_common()

    def trained(self, client: str) -> AdapterState:
        """Return the factors of blocks [k, L) trained for one client."""
        span = Span(self._participants[client], self.segment.shape.blocks)
        return self.bank.take(SHARED if self.shared else client, with_rest=True).within(span)

    def finish(self) -> None:
        """End the round: keep moments and personal factors where the run keeps them, drop the slots."""
        if self._training.optimizer_state == "keep" or self._training.order == "in-turn":
            self.client_states.moments.update({slot: one.moments() for slot, one in self._optimizers.items()})
        for slot in self._optimizers:
            if self._ranks.keeps_own:
                self.client_states.own[slot] = self.bank.take(slot, with_rest=True).select("B")
            self.bank.drop(slot)
        for client in list(self._copies):
            self._drop_copy(client)
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
        """Drop what the client's current step has added to the gradients of its own slot or copy."""
        self._drop_copy(client)
        self.common.forget(client)
        if client in self._optimizers:
            self._optimizers[client].forget()
            self.parking.rest(client)

    def rest(self, client: str) -> None:
        """Wait for no further step of this client in the round; its completed steps count."""
        self.common.rest(client)
        self._step_in_common()

    def leave(self, client: str) -> None:
        """Drop a participant that takes no further part in the round, with its own slot."""
        self._participants.pop(client, None)
        self.rest(client)
        if self._optimizers.pop(client, None) is not None:
            self.bank.drop(client)
            self.parking.remove(client)

    def place_of(self, message: Message) -> torch.device:
        """Return the device that computes with a client's message: it is best decoded there."""
        if isinstance(message, Activations) and message.client in self.cuts:
            return self.segment.device_of(self.cuts[message.client])
        return self.segment.device

    def slot(self, client: str) -> str:
        """Return the slot that the client's rows run with in a step."""
        return SHARED if self.shared and not self.by_arrival else client

    def _dropout(self, message: Activations) -> tuple[DropoutRows, ...]:
        if not message.training:
            return ()
        return self._ranks.dropout(message.client, message.step, message.micro_batch, message.lengths)

    def _shared_parameters(self) -> dict[ParameterKey, nn.Parameter]:
        return self.bank.parameters(SHARED)

    def _step_in_common(self) -> None:
        """Step the shared factors on all clients' completed steps, if no other is awaited."""
        if weight := self.common.take():
            self._optimizers[SHARED].step(divide_by=weight)

    def _drop_copy(self, client: str) -> None:
        if client in self._copies:
            self._copies.remove(client)
            self.bank.drop(client)

    def evaluation_slot(self, client: str) -> str:
        """Return the slot that the client's rows are evaluated with."""
        return f"{GLOBAL}/{client}" if self._ranks.keeps_own else GLOBAL
