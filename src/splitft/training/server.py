"""The server: holds blocks [k, L) for every client, and works on many clients' batches at once.

    client a, cut 2   (B_a, T, D) --[2,5)--+
    client b, cut 5   (B_b, T, D) ---------+--[5,L)--> split --> LastHidden for a, LastHidden for b

The base model is frozen and shared, so the rows of all clients go through one product; each client's rows
meet that client's own factors (`server_adapters: per-client`, SplitFed v1, arXiv 2004.12088), or one set that
all clients train (`shared`, SplitFed v2 and SplitLoRA, arXiv 2407.00952). A client joins at its cut.
With own factors, who else is in the batch changes nothing but rounding.

With shared factors the loss is that of the concatenated batch, sum_i M_i loss_i / sum_i M_i over the clients
of a step, and the one optimizer steps when all have been heard.

A client's step may come in micro-batches, up to `training.in_flight` of them underway at once. Each brings
the gradient of the whole step's mean loss at its own rows: gradients add up, and the optimizer steps after
the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from splitft.adapters import AdapterState, LocalOptimizer, Moments, attach, moments_within
from splitft.errors import ProtocolError
from splitft.geometry import Plan, Span
from splitft.model import Model, Segment, loss_and_gradient, summed_loss
from splitft.protocol import Activations, CutGradient, HeadGradient, HeldOutLoss, LastHidden, expect
from splitft.specs import SplitSpec, TrainingSpec
from splitft.training.batching import Group, group_by_length, in_random_order, of_step
from splitft.training.client_record import RoundProgress
from splitft.training.kept import ClientState
from splitft.training.onramp import backward_together, forward_together
from splitft.training.ranks import RankPolicy

GLOBAL, SHARED = "=global", "=shared"
"""Slots of the aggregated factors and of those that all clients train; no client's name begins with `=`."""


class Server:
    """The server's side of a whole run."""

    def __init__(
        self, model: Model, deepest: Span, ranks: RankPolicy, split: SplitSpec, training: TrainingSpec
    ) -> None:
        """Load `deepest`, the blocks after the shallowest cut, and the head if labels are here."""
        self._ranks, self._split, self._training = ranks, split, training
        self.segment: Segment = model.segment(deepest, head=split.labels == "server")
        self._bank = attach(self.segment.blocks, ranks.lora.targets, ranks.scale, model.dtype, ranks.gain)
        self._dtype = torch.promote_types(model.dtype, torch.float32)
        self._round = 0
        self._seats: dict[str, RoundProgress] = {}
        self._cuts: dict[str, int] = {}
        self._groups: dict[tuple[str, int], Group] = {}  # by client and micro-batch
        self._optimizers: dict[str, LocalOptimizer] = {}
        self._heard: dict[str, int] = {}  # shared factors: labelled tokens of who was heard this step
        self.kept = ClientState(per_client=not self._shared)
        """What is kept of clients across rounds."""

    def initial(self) -> AdapterState:
        """The global factors before training, over all L blocks."""
        return self._ranks.start(self._bank.sizes, self._dtype)

    @property
    def moments(self) -> dict[str, Moments]:
        """Optimizer moments by slot, when kept across rounds."""
        return self.kept.moments

    # --- rounds -----------------------------------------------------------------------------------

    def place(self, cuts: Mapping[str, int]) -> int:
        """Hold what these cuts leave to the server; returns bytes of weights read."""
        blocks = self.segment.shape.blocks
        for cut in cuts.values():
            Plan(cut, blocks, self._split.labels)
        self._cuts = dict(cuts)
        return self.segment.resize(Span(min(cuts.values()), blocks))

    def start(
        self,
        number: int,
        participants: Sequence[str],
        state: AdapterState,
        folded: AdapterState | None = None,
    ) -> None:
        """Give every participant (or all together) the round's factors and a fresh optimizer."""
        blocks = self.segment.shape.blocks
        self._seats = {name: RoundProgress(self._cuts[name]) for name in participants}
        self._round, self._groups, self._heard, self._optimizers = number, {}, {}, {}
        if self._shared:
            cuts = [self._cuts[name] for name in participants]
            slots = {SHARED: (Span(min(cuts), blocks), self._ranks.shared(cuts))}
        else:
            slots = {
                name: (Span(seat.cut, blocks), self._ranks.of(seat.cut, name))
                for name, seat in self._seats.items()
            }
        for slot, (span, ranks) in slots.items():
            trained, rest = self._ranks.split_trained(
                self.kept.personal(slot, state.within(span)), ranks, number
            )
            self._bank.put(slot, trained, rest, folded, self._ranks.sharing.trains)
            moments = moments_within(self.moments.get(slot, {}), span)
            self._optimizers[slot] = LocalOptimizer(
                self._bank.parameters(slot), self._training, moments, self._ranks.lora.lr_ratio, number
            )

    def trained(self, client: str) -> tuple[AdapterState, int]:
        """Factors of blocks [k, L) trained for one client, and the labelled tokens it has seen."""
        seat = self._seat(client)
        span = Span(seat.cut, self.segment.shape.blocks)
        return self._bank.take(self._slot(client), whole=True).within(span), seat.tokens

    def finish(self) -> None:
        """End the round: keep moments if they are kept, and forget everything else of it."""
        if self._training.optimizer_state == "keep" or self._training.order == "in-turn":
            self.moments.update({slot: one.moments() for slot, one in self._optimizers.items()})
        for slot in self._optimizers:
            if self._ranks.keeps_own:
                self.kept.own[slot] = self._bank.take(slot, whole=True).only("B")
            self._bank.drop(slot)
        self._optimizers, self._groups, self._seats = {}, {}, {}

    def install(self, state: AdapterState, folded: AdapterState | None = None) -> None:
        """Take the aggregated factors, to evaluate with; those of each client where it has its own."""
        if not self._ranks.keeps_own:
            self._bank.put(GLOBAL, state.within(self.segment.span), folded=folded)
            return
        for client, cut in self._cuts.items():
            held = state.within(Span(cut, self.segment.shape.blocks))
            self._bank.put(f"{GLOBAL}/{client}", self.kept.personal(client, held))

    # --- steps ------------------------------------------------------------------------------------

    def groups(self, messages: Sequence[Activations]) -> list[list[Activations]]:
        """Who is worked on together (`runtime.grouping`); with `shared-in-turn`, one by one."""
        if self._split.server_adapters == "shared-in-turn" and messages[0].training:
            step = self._seat(messages[0].client).step
            return in_random_order(messages, [self._ranks.seed, self._round, step])
        return group_by_length(messages, self._split.group_tokens)

    def forward(self, messages: Sequence[Activations]) -> dict[str, LastHidden | CutGradient | HeldOutLoss]:
        """One batch of one or several clients through the server's blocks; a reply for each.

        LastHidden (M, D) with labels on the clients; with labels here, the gradient or the loss at once.
        """
        training = messages[0].training
        for message in messages:
            expect(message, Activations, training=training)
            self.check(message)
        if len({message.client for message in messages}) < len(messages):
            raise ProtocolError("a client sends two batches at once")
        slot = self._slot if training else self._evaluated
        with torch.set_grad_enabled(training):
            group = forward_together(self.segment, self._bank, self._cuts, slot, messages, training)
        if training:
            for message in messages:
                self._groups[message.client, message.micro_batch] = group
                self._seat(message.client).take(message)
        if self._split.labels == "server":
            return dict(self._graded(group, training))
        return {
            client: LastHidden(step=message.step, micro_batch=message.micro_batch, hidden=output.detach())
            for client, output in group.outputs.items()
            for message in (group.messages[client],)
        }

    def check(self, message: Activations | HeadGradient) -> None:
        """Raise ProtocolError for what may not come now. Changes nothing."""
        if isinstance(message, HeadGradient):
            group = self._groups.get((message.client, message.micro_batch))
            if group is None:
                raise ProtocolError(f"{message.client} sends a gradient, but no batch of it is underway here")
            group.check(message)
            return
        if message.client not in self._cuts:
            raise ProtocolError(f"{message.client} is no client of this run")
        if message.training:
            seat = self._seat(message.client)
            expect(message, Activations, round=self._round)
            seat.check(message, self._training)
        if self._split.labels == "server":
            self._check_labels(message)

    def together(self, messages: Sequence[HeadGradient]) -> list[list[HeadGradient]]:
        """Those that answer one `forward` together, as `backward` takes them."""
        by_group: dict[int, list[HeadGradient]] = {}
        for message in messages:
            group = self._groups.get((message.client, message.micro_batch))
            by_group.setdefault(id(group), []).append(message)
        return list(by_group.values())

    def backward(self, messages: Sequence[HeadGradient]) -> dict[str, CutGradient]:
        """Gradients at the last hidden states, back to the cuts; the optimizers of these clients step.

        The messages answer one `forward`; who is missing from them may follow with a `backward` of its own,
        which costs another pass through the group, or `leave`.
        """
        group = self._groups.get((messages[0].client, messages[0].micro_batch))
        for message in messages:
            self.check(message)
            if self._groups.get((message.client, message.micro_batch)) is not group:
                raise ProtocolError(f"{message.client} sends a gradient for another group")
        assert group is not None
        at_cuts = self._back(group, {message.client: message.gradient for message in messages})
        return {
            message.client: CutGradient(
                step=message.step, micro_batch=message.micro_batch, gradient=at_cuts[message.client]
            )
            for message in messages
        }

    def forget(self, client: str) -> None:
        """Give up the step that is underway for a client, with what its finished micro-batches added."""
        for key in [key for key in self._groups if key[0] == client]:
            del self._groups[key]
        if client in self._seats:
            self._seats[client].forget()
        if client in self._optimizers:  # its own, with per-client adapters
            self._optimizers[client].forget()

    def leave(self, client: str) -> None:
        """Give up what the round has for a client that takes no further part in it."""
        self.forget(client)
        self._seats.pop(client, None)
        if self._optimizers.pop(client, None) is not None:  # its own, with per-client adapters
            self._bank.drop(client)

    # ----------------------------------------------------------------------------------------------

    def _check_labels(self, message: Activations) -> None:
        if message.labels is None:
            raise ProtocolError(f"{message.client} sends no labels, but this run has them on the server")
        vocab = self.segment.shape.vocab
        if int(message.labels.min()) < 0 or int(message.labels.max()) >= vocab:
            raise ProtocolError(f"{message.client} sends labels that are not token ids below {vocab}")

    def _graded(self, group: Group, training: bool) -> Mapping[str, LastHidden | CutGradient | HeldOutLoss]:
        """Loss here, since the labels are: the reply is the gradient at the cut, or the held-out loss."""
        losses, gradients = {}, {}
        for client, message in group.messages.items():
            assert message.labels is not None
            if training:
                graded = loss_and_gradient(self.segment, group.outputs[client], message.labels)
                losses[client] = graded[0]
                gradients[client] = of_step(message, graded[1])
            else:
                losses[client] = summed_loss(self.segment, group.outputs[client], message.labels)
        if not training:
            return {
                client: HeldOutLoss(step=message.step, loss=losses[client], tokens=message.labelled_tokens)
                for client, message in group.messages.items()
            }
        at_cuts = self._back(group, gradients)
        return {
            client: CutGradient(
                step=message.step,
                micro_batch=message.micro_batch,
                gradient=at_cuts[client],
                loss=losses[client],
            )
            for client, message in group.messages.items()
        }

    def _back(self, group: Group, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Backward through one group; returns gradients (N, D) at the cuts."""
        shared = self._split.server_adapters == "shared"  # one step on the loss of all
        weights = {client: group.messages[client].step_tokens if shared else 1 for client in gradients}
        awaited = [
            client
            for client, message in group.messages.items()
            if client not in gradients and self._groups.get((client, message.micro_batch)) is group
        ]
        at_cuts = backward_together(group, gradients, weights, again=bool(awaited))
        for client in gradients:
            self._groups.pop((client, group.messages[client].micro_batch), None)
        self._step({client: weights[client] for client in gradients if self._seats[client].give_back()})
        return at_cuts

    def _step(self, weights: Mapping[str, int]) -> None:
        """Optimizer steps for clients whose step is whole: each client's own, or one when all were heard.

        Clients of the group that are still awaited got gradients of zero, to which theirs will be added.
        """
        if self._split.server_adapters == "per-client":
            for client in weights:
                self._optimizers[client].step()
            return
        if self._split.server_adapters == "shared-in-turn":
            if weights:
                self._optimizers[SHARED].step()
            return
        self._heard.update(weights)
        if self._heard.keys() >= self._seats.keys():
            self._optimizers[SHARED].step(divide_by=sum(self._heard.values()))
            self._heard = {}

    def _slot(self, client: str) -> str:
        return SHARED if self._shared else client

    @property
    def _shared(self) -> bool:
        """Whether all clients train one set of factors here."""
        return self._split.server_adapters != "per-client"

    def _evaluated(self, client: str) -> str:
        return f"{GLOBAL}/{client}" if self._ranks.keeps_own else GLOBAL

    def _seat(self, client: str) -> RoundProgress:
        if client not in self._seats:
            raise ProtocolError(f"{client} does not take part in this round")
        return self._seats[client]
