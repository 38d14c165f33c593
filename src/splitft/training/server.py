"""The server: it holds blocks [k, L) for every client and works on many clients' batches at once.

    client a, cut 2   (B_a, T, D) --[2,5)--+
    client b, cut 5   (B_b, T, D) ---------+--[5,L)--> split --> LastHidden for a, LastHidden for b

The base model is frozen and shared, so the rows of all clients go through one product; each client's rows
meet the factors of its slot (`ServerBlocks`). A client joins at its cut. With a slot for each client, the
others in the batch change nothing but rounding.

A client's step may arrive in micro-batches, up to `training.in_flight` of them at once. Each carries the
gradient of the whole step's mean loss at its own rows: gradients add up, and the optimizer steps after the
last one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from splitft.adapters import AdapterState, Moments
from splitft.errors import ProtocolError
from splitft.geometry import Span
from splitft.model import CPU, Model, Segment
from splitft.protocol import Activations, CutGradient, HeadGradient, HeldOutLoss, LastHidden, expect
from splitft.specs import SplitSpec, TrainingSpec
from splitft.training.batching import Group, group_neighbours, in_random_order
from splitft.training.client_record import ClientStates, RoundProgress
from splitft.training.micro_batch import MicroBatch, StepTotals
from splitft.training.ranks import RankPolicy
from splitft.training.replicas import ReplicaPlan, ServerReplicas
from splitft.training.server_blocks import ServerBlocks


class Server:
    """The server's side of a whole run."""

    def __init__(
        self,
        model: Model,
        deepest: Span,
        ranks: RankPolicy,
        split: SplitSpec,
        training: TrainingSpec,
        devices: Sequence[torch.device] | ReplicaPlan = (CPU,),
    ) -> None:
        """Load `deepest`, the blocks after the shallowest cut, and the head if labels are on the server.

        Several `devices` divide the blocks in contiguous ranges; a plan divides the clients among processes.
        """
        self._ranks, self.split, self.training = ranks, split, training
        self.blocks: ServerBlocks = (
            ServerReplicas(model, deepest, ranks, split, training, devices)
            if isinstance(devices, ReplicaPlan)
            else ServerBlocks(model, deepest, ranks, split, training, devices)
        )
        self._round = 0
        self._progress: dict[str, RoundProgress] = {}
        self._groups: dict[tuple[str, int], Group] = {}  # in flight, by client and micro-batch

    @property
    def segment(self) -> Segment:
        """The blocks of the model."""
        return self.blocks.segment

    @property
    def client_states(self) -> ClientStates:
        """State of clients across rounds."""
        return self.blocks.client_states

    @property
    def moments(self) -> dict[str, Moments]:
        """Optimizer moments by slot, when kept across rounds."""
        return self.client_states.moments

    def close(self) -> None:
        """End the processes that hold the blocks, if there are any."""
        self.blocks.close()

    # --- rounds -----------------------------------------------------------------------------------

    def initial(self) -> AdapterState:
        """Return the global factors before training, over all L blocks."""
        return self.blocks.initial()

    def place(self, cuts: Mapping[str, int]) -> int:
        """Hold the blocks that these cuts leave to the server; return bytes of weights read."""
        return self.blocks.place(cuts)

    def start(
        self,
        number: int,
        participants: Sequence[str],
        state: AdapterState,
        folded: AdapterState | None = None,
    ) -> None:
        """Begin a round: load its factors for every participant, or for all together."""
        self._round, self._groups = number, {}
        self._progress = {name: RoundProgress() for name in participants}
        self.blocks.start(number, participants, state, folded)

    def trained(self, client: str) -> tuple[AdapterState, int]:
        """Return the factors of blocks [k, L) trained for a client, and the labelled tokens of its steps."""
        tokens = self._participant(client).tokens
        return self.blocks.trained(client), tokens

    def finish(self) -> None:
        """End the round."""
        self._groups, self._progress = {}, {}
        self.blocks.finish()

    def install(self, state: AdapterState, folded: AdapterState | None = None) -> None:
        """Load the aggregated factors to evaluate with."""
        self.blocks.install(state, folded)

    # --- steps ------------------------------------------------------------------------------------

    def groups(self, messages: Sequence[Activations]) -> list[list[Activations]]:
        """Group batches to run together.

        With `shared-in-turn` each runs by itself, with `shared-by-arrival` they keep their order.
        """
        if self.blocks.by_arrival and messages[0].training:
            return group_neighbours(messages, self.split.group_tokens)
        if self.split.server_adapters == "shared-in-turn" and messages[0].training:
            if self.split.turns == "fixed":
                order = list(self._progress)
                return [[one] for one in sorted(messages, key=lambda one: order.index(one.client))]
            step = self._participant(messages[0].client).steps
            return in_random_order(messages, [self._ranks.seed, self._round, step])
        if self.split.server_adapters == "shared" and self.training.micro_batches > 1:
            return [[message] for message in messages]  # so that their gradients can be kept apart
        return self.blocks.groups(messages)

    def forward(
        self, messages: Sequence[Activations], checked: bool = False
    ) -> dict[str, LastHidden | CutGradient | HeldOutLoss]:
        """Run one batch of one or several clients through the server's blocks; return a reply for each.

        LastHidden (M, D) with labels on the clients; with labels here, the gradient or the loss at once.
        With `checked`, each message has passed `check`.
        """
        return self.replies(self.launch(messages, checked))

    def launch(self, messages: Sequence[Activations], checked: bool = False) -> Group:
        """Begin `forward`: give the devices their work. `replies` waits for it.

        Launch several groups before the first reply, and they fill a pipeline of several devices.
        """
        training = messages[0].training
        for message in messages:
            expect(message, Activations, training=training)
            if not checked:
                self.check(message)
        if len({message.client for message in messages}) < len(messages):
            raise ProtocolError("a client sends two batches at once")
        group = self.blocks.forward(messages, training)
        if training:
            for message in messages:
                self._groups[message.client, message.micro_batch] = group
                self._participant(message.client).begin(message)
        return group

    def replies(self, group: Group) -> dict[str, LastHidden | CutGradient | HeldOutLoss]:
        """End `forward`: return a reply to each message of a launched group."""
        training = next(iter(group.messages.values())).training
        if self.split.labels == "server":
            return dict(self._train_on_labels(group) if training else self._evaluate_labels(group))
        return {
            client: LastHidden(step=message.step, micro_batch=message.micro_batch, hidden=output)
            for client, output in self.blocks.outputs(group).items()
            for message in (group.messages[client],)
        }

    def check(self, message: Activations | HeadGradient) -> None:
        """Raise ProtocolError if the message is not allowed now. Changes nothing."""
        if isinstance(message, HeadGradient):
            group = self._groups.get((message.client, message.micro_batch))
            if group is None:
                raise ProtocolError(f"{message.client} sends a gradient, but no batch of it is underway here")
            group.check(message)
            return
        if message.client not in self.blocks.cuts:
            raise ProtocolError(f"{message.client} is no client of this run")
        if message.training:
            progress = self._participant(message.client)
            expect(message, Activations, round=self._round)
            progress.check(message, self.training)
        if self.split.labels == "server":
            self._check_labels(message)

    def group_gradients(self, messages: Sequence[HeadGradient]) -> list[list[HeadGradient]]:
        """Group gradients that answer one `forward`, as `backward` takes them."""
        by_group: dict[int, list[HeadGradient]] = {}
        for message in messages:
            group = self._groups.get((message.client, message.micro_batch))
            by_group.setdefault(id(group), []).append(message)
        return list(by_group.values())

    def backward(self, messages: Sequence[HeadGradient], checked: bool = False) -> dict[str, CutGradient]:
        """Run backward from the last hidden states to the cuts; step the optimizers of completed steps.

        The messages answer one `forward`. A client missing from them may follow in a `backward` of its own,
        which costs another pass through the group, or `leave`. With `checked`, each has passed `check`.
        """
        group = self._groups.get((messages[0].client, messages[0].micro_batch))
        for message in messages:
            if not checked:
                self.check(message)
            if self._groups.get((message.client, message.micro_batch)) is not group:
                raise ProtocolError(f"{message.client} sends a gradient for another group")
        assert group is not None
        return self._backward(group, {one.client: (one.loss, one.gradient) for one in messages})

    def in_step(self, client: str) -> bool:
        """Return whether a step of this client has begun and is not complete."""
        return client in self._progress and bool(self._progress[client].begun)

    def completed_step(self, client: str) -> StepTotals | None:
        """Return the step that the client's last finished micro-batch completed; None if it did not."""
        return self._participant(client).completed

    def rest(self, client: str) -> None:
        """Forget the client's current step, and wait for no other in the round; its finished steps count."""
        self.forget(client)
        self.blocks.rest(client)

    def forget(self, client: str) -> None:
        """Forget the client's current step, with the gradients of its finished micro-batches."""
        for key in [key for key in self._groups if key[0] == client]:
            del self._groups[key]
        if client in self._progress:
            self._progress[client].forget()
        self.blocks.forget(client)

    def leave(self, client: str) -> None:
        """Drop a client that takes no further part in the round."""
        self.forget(client)
        self._progress.pop(client, None)
        self.blocks.leave(client)

    # ----------------------------------------------------------------------------------------------

    def _check_labels(self, message: Activations) -> None:
        if message.labels is None:
            raise ProtocolError(f"{message.client} sends no labels, but this run has them on the server")
        vocab = self.segment.shape.vocab
        if int(message.labels.min()) < 0 or int(message.labels.max()) >= vocab:
            raise ProtocolError(f"{message.client} sends labels that are not token ids below {vocab}")

    def _train_on_labels(self, group: Group) -> Mapping[str, CutGradient]:
        """Compute loss and gradients at once, because labels are here."""
        graded = {
            client: (loss, MicroBatch.of_message(group.messages[client]).weighted(gradient))
            for client, (loss, gradient) in self.blocks.losses_and_gradients(group).items()
        }
        return self._backward(group, graded)

    def _evaluate_labels(self, group: Group) -> Mapping[str, HeldOutLoss]:
        """Compute held-out losses, because labels are here."""
        return {
            client: HeldOutLoss(step=message.step, loss=loss, tokens=message.labelled_tokens, correct=correct)
            for client, (loss, correct) in self.blocks.held_out_sums(group).items()
            for message in (group.messages[client],)
        }

    def _backward(
        self, group: Group, graded: Mapping[str, tuple[float | None, torch.Tensor]]
    ) -> dict[str, CutGradient]:
        """Run backward through one group from these clients' (loss, gradient)."""
        shared = self.split.server_adapters == "shared"  # one step on the loss of all
        weights = {client: group.messages[client].step_tokens if shared else 1 for client in graded}
        retain_graph = any(
            client not in graded and self._groups.get((client, message.micro_batch)) is group
            for client, message in group.messages.items()
        )
        gradients = {client: gradient for client, (_, gradient) in graded.items()}
        at_cuts = self.blocks.backward(group, gradients, weights, retain_graph)
        replies, completed = {}, {}
        for client, (loss, _) in graded.items():
            message = group.messages[client]
            self._groups.pop((client, message.micro_batch), None)
            if self._progress[client].finish(message.micro_batch, loss):
                completed[client] = weights[client]
            replies[client] = CutGradient(
                step=message.step,
                micro_batch=message.micro_batch,
                gradient=at_cuts[client],
                loss=loss if self.split.labels == "server" else None,
            )
        self.blocks.step(completed)
        return replies

    def _participant(self, client: str) -> RoundProgress:
        if client not in self._progress:
            raise ProtocolError(f"{client} does not take part in this round")
        return self._progress[client]
