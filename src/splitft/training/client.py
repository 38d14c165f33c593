"""A data owner: holds its text, the embedding, its first k blocks and, by default, the head.

    start(RoundStart) -> RoundReady
    forward() -> Activations                     tokens stay here, hidden states leave
    head(LastHidden) -> HeadGradient             labels stay here
    backward(CutGradient)                        after the last micro-batch, the client's own optimizer steps
    upload() -> AdapterUpload
    install(GlobalAdapters), held_out(i) -> Activations, held_out_head(...), evaluation() -> Evaluation

A client says what it has to say and is told what comes back; who carries the messages is not its concern.
The order of messages is that of `protocol`, and anything else is refused. What the run and the site do to
hidden states and gradients before they leave is `privacy.Defence`'s; adapters of `private_blocks` stay here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from splitft.adapters import AdapterState, LocalOptimizer, Moments, moments_within
from splitft.data.text import Batch, BatchStream
from splitft.errors import ProtocolError
from splitft.geometry import Plan, Side
from splitft.model import Model, loss_and_gradient, pack, summed_loss
from splitft.privacy.defence import Defence
from splitft.privacy.noise import Noise
from splitft.protocol import (
    Activations,
    AdapterUpload,
    CutGradient,
    Evaluation,
    GlobalAdapters,
    HeadGradient,
    HeldOutLoss,
    Join,
    LastHidden,
    Message,
    RoundReady,
    RoundStart,
    expect,
)
from splitft.specs import PrivacySpec, TrainingSpec
from splitft.training.client_blocks import ClientBlocks
from splitft.training.micro_batch import BatchPart, MicroBatch, check_finite, mean_loss
from splitft.training.ranks import RankPolicy


class Client:
    """One client over a whole run."""

    def __init__(
        self,
        name: str,
        model: Model,
        cut: int,
        labels: Side,
        ranks: RankPolicy,
        training: TrainingSpec,
        stream: BatchStream,
        held_out: Sequence[Batch],
        defence: Defence | None = None,
        numbered: bool = False,
    ) -> None:
        """Load the blocks [0, cut) of the model. Raises GeometryError or ModelError if that cannot be.

        With `numbered`, activations tell which of the client's examples they are of, without its text.
        """
        self.name = name
        self._defence = defence or Defence(PrivacySpec(), Noise(ranks.seed, name))
        self.steps = 0
        """Optimizer steps taken, over the whole run."""
        self._ranks, self._training = ranks, training
        self._stream, self._held_out, self._numbered = stream, tuple(held_out), numbered
        plan = Plan(cut, model.shape.blocks, labels)
        self._holding = ClientBlocks(name, model, plan, ranks, self._defence.privacy.private_blocks)
        self.segment, self._bank = self._holding.segment, self._holding.bank
        self._moments: Moments = {}
        self._optimizer: LocalOptimizer | None = None
        self._step: tuple[Batch, ...] = ()  # micro-batches of the step that has begun
        self._sent = self._taken = 0  # of these: have left, and are back
        self._underway: dict[int, MicroBatch] = {}  # those between, by number; in evaluation 0 alone
        self._graded: set[int] = set()  # those for which the head has answered
        self._round = 0
        self._tokens = 0  # labelled, trained on in this round without a server
        self._evaluated = (0.0, 0)

    @property
    def plan(self) -> Plan:
        """Who holds which blocks now."""
        return self._holding.plan

    @property
    def whole(self) -> bool:
        """Whether all blocks and the head are here, so that training needs no server."""
        return self.plan.cut == self.plan.blocks and self.plan.labels == "client"

    # --- training ---------------------------------------------------------------------------------

    def start(self, message: Message) -> RoundReady:
        """Move to the round's cut and take up the adapters to train from."""
        expect(message, RoundStart)
        assert isinstance(message, RoundStart)
        self._defence.check_cut(message.cut)
        before = self.plan.client
        own = self._holding.move(message.cut, message.adapters, message.folded)
        given_up = moments_within(self._moments, before.minus(self.plan.client))
        kept = {} if self._training.order == "in-turn" else self._moments
        self._moments = moments_within({**kept, **message.moments}, self.plan.client)
        self._round, self._tokens = message.round, 0
        self._end_step()
        parameters, ratio = self._holding.train(message.round), self._ranks.lora.lr_ratio
        self._optimizer = LocalOptimizer(parameters, self._training, self._moments, ratio, message.round)
        return RoundReady(client=self.name, round=message.round, moments=given_up, own=own)

    @property
    def unsent(self) -> int:
        """Micro-batches of the step that has begun which have not left; 0 between steps."""
        return len(self._step) - self._sent

    def forward(self) -> Activations:
        """The next micro-batch of this step, or the first of the next, through the client's blocks."""
        self._in_round()
        if not self._step:
            self._step = self._divided()
        if not self.unsent:
            raise ProtocolError(f"{self.name}: all of step {self.steps} is underway; its gradient is due")
        number, batch = self._sent, self._step[self._sent]
        with torch.enable_grad():
            hidden = self._leaving(batch, "training", self._round, self.steps, *_beyond_first(number))
        labelled = sum(one.labelled_tokens for one in self._step)
        self._underway[number] = MicroBatch(batch, hidden, BatchPart(number, len(self._step), labelled))
        self._sent += 1
        return self._activations(self.steps, number, training=True)

    def head(self, message: Message) -> HeadGradient:
        """Loss of a batch underway, and its gradient at the last hidden states.

        Raises RunError if the loss is not finite.
        """
        underway = self._awaited(message)
        batch, number = underway.batch, underway.part.number
        expect(message, LastHidden, step=self.steps)
        assert isinstance(message, LastHidden)
        underway.check_rows(self.name, message)
        place = (self._round, self.steps, *_beyond_first(number))
        labels = self._defence.labels(batch.targets(), message.hidden, self.segment.logits, *place)
        loss, gradient = loss_and_gradient(self.segment, message.hidden, labels)
        check_finite(loss, self.name, self._round, self.steps)
        gradient = self._defence.gradient(
            gradient,
            message.hidden,
            self.segment.shape.vocab,
            lambda rows, labels: loss_and_gradient(self.segment, rows, labels)[1],
            *place,
        )
        self._graded.add(number)
        return HeadGradient(
            client=self.name,
            round=self._round,
            step=self.steps,
            micro_batch=number,
            loss=loss,
            gradient=underway.part.weighted(gradient, batch.labelled_tokens),
        )

    def backward(self, message: Message) -> None:
        """Gradient at the cut through the client's blocks; after the last of the step, one optimizer step."""
        underway, optimizer = self._awaited(message), self._in_round()
        number = underway.part.number
        graded = number in self._graded or self.plan.labels == "server"
        expect(message, CutGradient if graded else LastHidden)
        expect(message, CutGradient, step=self.steps)
        assert isinstance(message, CutGradient)
        if message.gradient.shape != underway.hidden.shape:
            raise ProtocolError(f"CutGradient {tuple(message.gradient.shape)} for {underway.hidden.shape}")
        if underway.hidden.requires_grad:  # it does not if no layer of these blocks is adapted
            torch.autograd.backward([underway.hidden], [message.gradient.to(underway.hidden.dtype)])
        del self._underway[number]
        self._graded.discard(number)
        self._taken += 1
        if self._taken == len(self._step):
            optimizer.step()
            self._end_step()
            self.steps += 1

    def step_alone(self) -> tuple[float, Batch]:
        """One step of a client that holds all blocks and the head; returns its loss and its batch.

        Raises RunError if the loss is not finite.
        """
        optimizer = self._in_round()
        batch, parts, losses = self._stream.batch(self.steps), self._divided(), []
        for number, own in enumerate(parts):
            with torch.enable_grad():
                last = self._holding.run(own)[own.positions()]  # (M, D)
            part_loss, gradient = loss_and_gradient(self.segment, last.detach(), own.targets())
            check_finite(part_loss, self.name, self._round, self.steps)
            losses.append((part_loss, own.labelled_tokens))
            gradient = BatchPart(number, len(parts), batch.labelled_tokens).weighted(
                gradient, own.labelled_tokens
            )
            if last.requires_grad:
                torch.autograd.backward([last], [gradient.to(last.dtype)])
        loss = mean_loss(losses)
        optimizer.step()
        self.steps += 1
        self._tokens += batch.labelled_tokens
        return loss, batch

    def upload(self) -> AdapterUpload:
        """The client's factors as far as they leave it, and its moments if it hands them on."""
        optimizer = self._in_round()
        moments = optimizer.moments()
        handed_on = self._training.order == "in-turn"
        if self._training.optimizer_state == "keep" and not handed_on:
            self._moments = moments
        self._optimizer = None
        self._end_step()
        return AdapterUpload(
            client=self.name,
            round=self._round,
            adapters=self._holding.trained(),
            moments=moments if handed_on else {},
            tokens=self._tokens,
        )

    # --- the global adapters ----------------------------------------------------------------------

    def install(self, message: Message) -> None:
        """Take the aggregated factors of the client's blocks, to evaluate and to start from."""
        expect(message, GlobalAdapters)
        assert isinstance(message, GlobalAdapters)
        self._holding.install(message.round, message.adapters, message.folded)
        self._round = message.round
        self._evaluated = (0.0, 0)

    @property
    def held_out_batches(self) -> int:
        """How many batches an evaluation has."""
        return len(self._held_out)

    @torch.no_grad()
    def held_out(self, index: int) -> Activations:
        """One held-out batch through the client's blocks, without gradient."""
        batch = self._held_out[index]
        self._underway = {0: MicroBatch(batch, self._leaving(batch, "evaluation", self._round, index))}
        return self._activations(index, 0, training=False)

    @torch.no_grad()
    def held_out_alone(self, index: int) -> None:
        """Add up the loss of one held-out batch, at a client that holds all blocks and the head."""
        batch = self._held_out[index]
        last = self._holding.run(batch)[batch.positions()]
        self._add(summed_loss(self.segment, last, batch.targets()), batch)

    def held_out_head(self, message: Message) -> None:
        """Add up the loss of the held-out batch underway."""
        batch = self._awaited().batch
        expect(message, LastHidden if self.plan.labels == "client" else HeldOutLoss)
        if isinstance(message, LastHidden):
            self._awaited().check_rows(self.name, message)
            self._add(summed_loss(self.segment, message.hidden, batch.targets()), batch)
        else:
            assert isinstance(message, HeldOutLoss)
            self._add(message.loss, batch)
        self._underway = {}

    def held_out_gradient(self, message: LastHidden) -> torch.Tensor:
        """Gradient (M, D) of the held-out batch underway at its last hidden states, which changes nothing."""
        batch = self._awaited().batch
        self._awaited().check_rows(self.name, message)
        return loss_and_gradient(self.segment, message.hidden, batch.targets())[1]

    def evaluation(self) -> Evaluation:
        """The held-out loss so far, and start counting afresh."""
        loss, tokens = self._evaluated
        self._evaluated = (0.0, 0)
        return Evaluation(client=self.name, round=self._round, loss=loss, tokens=tokens)

    # --- what a checkpoint keeps ------------------------------------------------------------------

    def kept(self) -> tuple[int, Moments]:
        """Steps taken, and the optimizer's moments if they are kept across rounds."""
        return self.steps, self._moments

    def private(self) -> AdapterState:
        """Factors of the blocks that this client never uploads."""
        return self._holding.private()

    def own(self) -> AdapterState:
        """The factors B that never leave, by rules that have such."""
        return self._holding.own()

    def join(self, message: Join, moments: Moments) -> None:
        """Take part in a run that is underway, or again after having been away."""
        self._defence.check_cut(message.cut)
        self._holding.join(message.cut, message.round, message.adapters, message.folded)
        self.steps, self._moments = message.steps, moments
        self._round, self._optimizer, self._evaluated = message.round, None, (0.0, 0)
        self._end_step()

    def restore(
        self,
        cut: int,
        known: AdapterState,
        steps: int,
        moments: Moments,
        folded: AdapterState | None = None,
    ) -> None:
        """Continue as the client that `kept` this, with these factors of its blocks, its private ones too."""
        self._holding.restore(cut, known, folded or AdapterState())
        self.steps, self._moments = steps, moments

    # ----------------------------------------------------------------------------------------------

    def _leaving(self, batch: Batch, *place: object) -> torch.Tensor:
        """Tokens through the client's blocks -> (N, D), as it may leave."""

        def base(public: Batch) -> torch.Tensor:
            return pack(self._holding.run(public, base=True), public.lengths)

        hidden = pack(self._holding.run(batch), batch.lengths)
        return self._defence.hidden(hidden, self.plan.cut, base, *place)

    def _activations(self, step: int, number: int, training: bool) -> Activations:
        told = {"numbered": self._numbered, "with_labels": self.plan.labels == "server"}
        return self._underway[number].activations(self.name, self._round, step, training=training, **told)

    def _divided(self) -> tuple[Batch, ...]:
        return self._stream.batch(self.steps).divided(self._training.micro_batches)

    def _end_step(self) -> None:
        """Nothing of a step is underway any more."""
        self._step, self._sent, self._taken = (), 0, 0
        self._underway, self._graded = {}, set()

    def _add(self, loss: float, batch: Batch) -> None:
        self._evaluated = (self._evaluated[0] + loss, self._evaluated[1] + batch.labelled_tokens)

    def _in_round(self) -> LocalOptimizer:
        if self._optimizer is None:
            raise ProtocolError(f"{self.name}: no round is underway; RoundStart is due first")
        return self._optimizer

    def _awaited(self, message: Message | None = None) -> MicroBatch:
        number = getattr(message, "micro_batch", 0)
        if not self._underway:
            raise ProtocolError(f"{self.name}: a reply came, but no batch is underway")
        if number not in self._underway:
            raise ProtocolError(f"{self.name}: a reply came to micro-batch {number}, which is not underway")
        return self._underway[number]


def _beyond_first(number: int) -> tuple[int, ...]:
    """What tells a micro-batch apart in the seed of its noise; nothing for the first."""
    return (number,) if number else ()
