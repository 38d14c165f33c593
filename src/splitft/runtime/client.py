"""A data owner: holds its text, the embedding, its first k blocks and, by default, the head.

    start(RoundStart) -> RoundReady
    forward() -> Activations                     tokens stay here, hidden states leave
    head(LastHidden) -> HeadGradient             labels stay here
    backward(CutGradient)                        and the client's own optimizer steps
    upload() -> AdapterUpload
    install(GlobalAdapters), held_out(i) -> Activations, held_out_head(...), evaluation() -> Evaluation

A client says what it has to say and is told what comes back; who carries the messages is not its concern.
The order of messages is that of `protocol`, and anything else is refused. What the run and the site do to
hidden states and gradients before they leave is `privacy.Defence`'s; adapters of `private_blocks` stay here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from splitft.adapters import AdapterState, LocalOptimizer, Moments, attach, merged, moments_within
from splitft.data.text import Batch, BatchStream
from splitft.errors import ProtocolError, RunError
from splitft.geometry import Plan, Side, Span
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
    LastHidden,
    Message,
    RoundReady,
    RoundStart,
    expect,
)
from splitft.runtime.ranks import Ranks
from splitft.specs import PrivacySpec, TrainingSpec

SLOT = "own"
"""The one set of factors that a client has."""


@dataclass(frozen=True)
class _Underway:
    """A batch whose hidden states have left and whose gradient has not come back."""

    batch: Batch
    hidden: torch.Tensor
    """(N, D) at the cut, as it leaves, with its graph if it is trained on."""


class Client:
    """One client over a whole run."""

    def __init__(
        self,
        name: str,
        model: Model,
        cut: int,
        labels: Side,
        ranks: Ranks,
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
        self.plan = Plan(cut, model.shape.blocks, labels)
        self.steps = 0
        """Optimizer steps taken, over the whole run."""
        self._ranks, self._training = ranks, training
        self._stream, self._held_out, self._numbered = stream, tuple(held_out), numbered
        self.segment = model.segment(self.plan.client, embedding=True, head=labels == "client")
        self._bank = attach(self.segment.blocks, ranks.lora.targets, ranks.scale, model.dtype, ranks.gain)
        dtype = torch.promote_types(model.dtype, torch.float32)
        sizes = {key: size for key, size in self._bank.sizes.items() if key[0] in self.plan.client}
        # the factors of the blocks held here, at the global ranks, and what is folded into their base
        self._known, self._folded = ranks.start(sizes, dtype), AdapterState()
        self._dtype = dtype
        self._bank.put(SLOT, self._known)
        self._moments: Moments = {}
        self._optimizer: LocalOptimizer | None = None
        self._underway: _Underway | None = None
        self._graded = False  # whether the head has answered for the batch underway
        self._round = 0
        self._tokens = 0  # labelled, trained on in this round without a server
        self._evaluated = (0.0, 0)

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
        span = Plan(message.cut, self.plan.blocks, self.plan.labels).client
        left = self.plan.client.minus(span)
        given_up = moments_within(self._moments, left)
        own = self.own().within(left)
        known = self._known.updated(message.adapters)
        lacking = {block for block, _ in self._bank.sizes if block in span} - set(known.ranks())
        if lacking:
            raise ProtocolError(f"no factors came for block {min(lacking)}, which the new cut brings here")
        self.segment.resize(span)
        self.plan = Plan(message.cut, self.plan.blocks, self.plan.labels)
        self._known = known.within(span)
        self._folded = self._folded.updated(message.folded).within(span)
        kept = {} if self._training.order == "in-turn" else self._moments
        self._moments = moments_within({**kept, **message.moments}, span)
        self._round, self._underway, self._graded, self._tokens = message.round, None, False, 0
        ranks = self._ranks.of(message.cut, self.name)
        trained, rest = self._ranks.parted(self._known, ranks, message.round)
        self._bank.put(SLOT, trained, rest, self._folded, self._ranks.sharing.trains)
        self._optimizer = LocalOptimizer(
            self._bank.parameters(SLOT),
            self._training,
            self._moments,
            self._ranks.lora.lr_ratio,
            message.round,
        )
        return RoundReady(client=self.name, round=message.round, moments=given_up, own=own)

    def forward(self) -> Activations:
        """The next batch through the client's blocks."""
        self._in_round()
        batch = self._stream.batch(self.steps)
        with torch.enable_grad():
            hidden = self._leaving(batch, "training", self._round, self.steps)
        self._underway = _Underway(batch, hidden)
        return self._activations(self.steps, training=True)

    def head(self, message: Message) -> HeadGradient:
        """Loss of the batch underway, and its gradient at the last hidden states.

        Raises RunError if the loss is not finite.
        """
        batch = self._awaited().batch
        expect(message, LastHidden, step=self.steps)
        assert isinstance(message, LastHidden)
        self._check_rows(message, batch)
        loss, gradient = loss_and_gradient(self.segment, message.hidden, batch.targets())
        self._check_finite(loss)
        gradient = self._defence.gradient(
            gradient,
            message.hidden,
            self.segment.shape.vocab,
            lambda rows, labels: loss_and_gradient(self.segment, rows, labels)[1],
            self._round,
            self.steps,
        )
        self._graded = True
        return HeadGradient(
            client=self.name, round=self._round, step=self.steps, loss=loss, gradient=gradient
        )

    def backward(self, message: Message) -> None:
        """Gradient at the cut through the client's blocks, then one optimizer step."""
        underway, optimizer = self._awaited(), self._in_round()
        expect(message, CutGradient if self._graded or self.plan.labels == "server" else LastHidden)
        expect(message, CutGradient, step=self.steps)
        assert isinstance(message, CutGradient)
        if message.gradient.shape != underway.hidden.shape:
            raise ProtocolError(f"CutGradient {tuple(message.gradient.shape)} for {underway.hidden.shape}")
        if underway.hidden.requires_grad:  # it does not if no layer of these blocks is adapted
            torch.autograd.backward([underway.hidden], [message.gradient.to(underway.hidden.dtype)])
        optimizer.step()
        self._underway, self._graded = None, False
        self.steps += 1

    def step_alone(self) -> tuple[float, Batch]:
        """One step of a client that holds all blocks and the head; returns its loss and its batch.

        Raises RunError if the loss is not finite.
        """
        optimizer = self._in_round()
        batch = self._stream.batch(self.steps)
        with torch.enable_grad():
            last = self._through_blocks(batch, SLOT)[batch.positions()]  # (M, D)
        loss, gradient = loss_and_gradient(self.segment, last.detach(), batch.targets())
        self._check_finite(loss)
        if last.requires_grad:
            torch.autograd.backward([last], [gradient.to(last.dtype)])
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
        trained, whole = self._bank.take(SLOT), self._bank.take(SLOT, whole=True)
        self._known = self._known.updated(whole.within(self._private))
        if self._ranks.keeps_own:
            self._known = whole.only("B").completed(self._known)
        shared = trained.within(self.plan.client.minus(self._private)).only(self._ranks.sharing.up)
        return AdapterUpload(
            client=self.name,
            round=self._round,
            adapters=shared,
            moments=moments if handed_on else {},
            tokens=self._tokens,
        )

    # --- the global adapters ----------------------------------------------------------------------

    def install(self, message: Message) -> None:
        """Take the aggregated factors of the client's blocks, to evaluate and to start from."""
        expect(message, GlobalAdapters)
        assert isinstance(message, GlobalAdapters)
        shared = self.plan.client.minus(self._private)
        sizes = {key: size for key, size in self._bank.sizes.items() if key[0] in shared}
        down = self._ranks.sharing.down
        if set(message.adapters.keys()) != (set(sizes) if down else set()):
            raise ProtocolError(f"{self.name}: the global adapters are not those of {self.plan.client}")
        news = message.adapters.completed(self._known)
        news = news if down else self._ranks.start(sizes, self._dtype, message.round)
        self._known = self.private().union(news)
        self._folded = merged(self._folded, message.folded)
        self._bank.put(SLOT, self._known, folded=self._folded)
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
        self._underway = _Underway(batch, self._leaving(batch, "evaluation", self._round, index))
        return self._activations(index, training=False)

    @torch.no_grad()
    def held_out_alone(self, index: int) -> None:
        """Add up the loss of one held-out batch, at a client that holds all blocks and the head."""
        batch = self._held_out[index]
        last = self._through_blocks(batch, SLOT)[batch.positions()]
        loss = summed_loss(self.segment, last, batch.targets())
        self._evaluated = (self._evaluated[0] + loss, self._evaluated[1] + batch.labelled_tokens)

    def held_out_head(self, message: Message) -> None:
        """Add up the loss of the held-out batch underway."""
        batch = self._awaited().batch
        expect(message, LastHidden if self.plan.labels == "client" else HeldOutLoss)
        if isinstance(message, LastHidden):
            self._check_rows(message, batch)
            loss = summed_loss(self.segment, message.hidden, batch.targets())
        else:
            assert isinstance(message, HeldOutLoss)
            loss = message.loss
        self._evaluated = (self._evaluated[0] + loss, self._evaluated[1] + batch.labelled_tokens)
        self._underway = None

    def held_out_gradient(self, message: LastHidden) -> torch.Tensor:
        """Gradient (M, D) of the held-out batch underway at its last hidden states, which changes nothing."""
        batch = self._awaited().batch
        self._check_rows(message, batch)
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
        return self._known.within(self._private)

    def own(self) -> AdapterState:
        """The factors B that never leave, by rules that have such."""
        return self._known.only("B") if self._ranks.keeps_own else AdapterState()

    def restore(
        self,
        cut: int,
        known: AdapterState,
        steps: int,
        moments: Moments,
        folded: AdapterState | None = None,
    ) -> None:
        """Continue as the client that `kept` this, with these factors of its blocks, its private ones too."""
        self.plan = Plan(cut, self.plan.blocks, self.plan.labels)
        self.segment.resize(self.plan.client)
        self._known, self.steps, self._moments = known, steps, moments
        self._folded = folded or AdapterState()
        self._bank.put(SLOT, known, folded=self._folded)

    # ----------------------------------------------------------------------------------------------

    @property
    def _private(self) -> Span:
        return Span(0, min(self._defence.privacy.private_blocks, self.plan.cut))

    def _leaving(self, batch: Batch, *place: object) -> torch.Tensor:
        """Tokens through the client's blocks -> (N, D), as it may leave."""

        def base(public: Batch) -> torch.Tensor:
            return self._run(public, None)

        return self._defence.hidden(self._run(batch, SLOT), self.plan.cut, base, *place)

    def _run(self, batch: Batch, slot: str | None) -> torch.Tensor:
        return pack(self._through_blocks(batch, slot), batch.lengths)

    def _through_blocks(self, batch: Batch, slot: str | None) -> torch.Tensor:
        """Tokens through the client's blocks -> (B, T, D)."""
        with self._bank.routed([(slot, len(batch.lengths))]):
            return self.segment.run(batch.tokens, self.plan.client)

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise RunError(
                f"{self.name}: the loss is {loss} at step {self.steps} of round {self._round}; "
                "lower training.lr, or look at the client's text"
            )

    def _activations(self, step: int, training: bool) -> Activations:
        underway = self._awaited()
        batch = underway.batch
        starts = [first - 1 for first in batch.labelled_from]
        stops = [length - 1 for length in batch.lengths]
        return Activations(
            client=self.name,
            round=self._round,
            step=step,
            training=training,
            lengths=batch.lengths,
            labelled=tuple(zip(starts, stops, strict=True)),
            examples=batch.numbers if self._numbered else (),
            hidden=underway.hidden.detach(),
            labels=batch.targets() if self.plan.labels == "server" else None,
        )

    def _in_round(self) -> LocalOptimizer:
        if self._optimizer is None:
            raise ProtocolError(f"{self.name}: no round is underway; RoundStart is due first")
        return self._optimizer

    def _check_rows(self, message: LastHidden, batch: Batch) -> None:
        if len(message.hidden) != batch.labelled_tokens:
            raise ProtocolError(
                f"{self.name}: LastHidden has {len(message.hidden)} rows, {batch.labelled_tokens} were due"
            )

    def _awaited(self) -> _Underway:
        if self._underway is None:
            raise ProtocolError(f"{self.name}: a reply came, but no batch is underway")
        return self._underway
