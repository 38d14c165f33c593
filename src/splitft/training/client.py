"""The client: its text, the embedding, the first k blocks and, by default, the head.

    start(RoundStart) -> RoundReady
    forward() -> Activations                     tokens stay here, hidden states leave
    head(LastHidden) -> HeadGradient             labels stay here
    backward(CutGradient)                        after the last micro-batch the client's optimizer steps
    upload() -> AdapterUpload
    install(GlobalAdapters), then the evaluation of `held_out`

A client turns messages into messages; carrying them is left to its caller. Messages out of order raise
ProtocolError. `privacy.Defence` changes hidden states and gradients before they leave, as the run and the
site ask. Adapters of `private_blocks` never leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from splitft.adapters import AdapterState, LocalOptimizer, Moments, moments_within
from splitft.data.text import Batch, BatchStream
from splitft.errors import ProtocolError
from splitft.geometry import Plan, Side
from splitft.model import CPU, Model, checkpoint_blocks, pick
from splitft.privacy.defence import Defence
from splitft.privacy.noise import Noise
from splitft.protocol import (
    Activations,
    AdapterUpload,
    Again,
    CutGradient,
    GlobalAdapters,
    HeadGradient,
    Join,
    LastHidden,
    Message,
    RoundReady,
    RoundStart,
    expect,
)
from splitft.specs import PrivacySpec, TrainingSpec
from splitft.training.client_blocks import SLOT, ClientBlocks
from splitft.training.held_out import HeldOutEvaluator
from splitft.training.micro_batch import MicroBatch, StepTotals
from splitft.training.parking import Parking
from splitft.training.ranks import RankPolicy
from splitft.training.sent_batch import SentBatch, grade, split_batch


@dataclass(frozen=True)
class ClientSetup:
    """The text of a client and the terms it trains on, whatever its cut."""

    ranks: RankPolicy
    training: TrainingSpec
    stream: BatchStream
    """Batches to train on, by step."""
    held_out: Sequence[Batch] = ()
    """Batches to evaluate on."""
    labels: Side = "client"
    """The side that computes the loss."""
    defence: Defence | None = None
    """Defences of the run and the site; none by default."""
    numbered: bool = False
    """True if activations carry the numbers of their examples, for codecs that compare epochs."""
    device: torch.device = CPU
    """Device of the blocks, the head, the factors and their optimizer."""
    parking: Parking | None = None
    """Room for factors and moments that several clients share on the device; without bound by default."""


class Client:
    """One client over a whole run."""

    def __init__(self, name: str, model: Model, cut: int, setup: ClientSetup) -> None:
        """Load the blocks [0, cut) of the model. Raises GeometryError or ModelError if that is impossible."""
        self.name = name
        self.steps = 0
        """Optimizer steps taken, over the whole run."""
        self.setup, self._training = setup, setup.training
        self._defence = setup.defence or Defence(PrivacySpec(), Noise(setup.ranks.seed, name))
        plan = Plan(cut, model.shape.blocks, setup.labels)
        self.blocks = ClientBlocks(name, model, plan, setup.ranks, self._defence, setup.device)
        self.segment = self.blocks.segment
        if setup.training.checkpoint_blocks:
            checkpoint_blocks(self.segment.blocks, self.blocks.bank.recorded)
        self.held_out = HeldOutEvaluator(self.blocks, setup.held_out, self._defence, setup.numbered)
        self._parking = setup.parking or Parking()
        self._moments: Moments = {}
        self._optimizer: LocalOptimizer | None = None
        self._unsent: list[tuple[MicroBatch, Batch]] = []  # micro-batches of the current step still to send
        self._sent: dict[int, SentBatch] = {}  # those in flight, by number
        self._round = 0
        self._tokens = 0  # labelled tokens of the round's local steps

    @property
    def plan(self) -> Plan:
        """The split of the model between this client and the server."""
        return self.blocks.plan

    @property
    def whole(self) -> bool:
        """True if this client holds all blocks and the head, so that training needs no server."""
        return self.plan.cut == self.plan.blocks and self.plan.labels == "client"

    # --- training ---------------------------------------------------------------------------------

    def start(self, message: Message) -> RoundReady:
        """Move to the round's cut and load the adapters to train."""
        message = expect(message, RoundStart)
        self._defence.check_cut(message.cut)
        before = self.plan.client
        own = self.blocks.move(message.cut, message.adapters, message.folded)
        given_up = moments_within(self._moments, before.minus(self.plan.client))
        kept = {} if self._training.order == "in-turn" else self._moments
        self._moments = moments_within({**kept, **message.moments}, self.plan.client)
        self._round, self._tokens = message.round, 0
        self.held_out.begin(message.round)
        self._end_step()
        parameters, ratio = self.blocks.train(message.round), self.setup.ranks.lora.lr_ratio
        self._optimizer = LocalOptimizer(parameters, self._training, self._moments, ratio, message.round)
        self._parking.add(self.name, self.blocks.bank, SLOT, self._optimizer)
        return RoundReady(client=self.name, round=message.round, moments=given_up, own=own)

    @property
    def unsent(self) -> int:
        """Micro-batches of the current step that are still to send; 0 between steps."""
        return len(self._unsent)

    def forward(self) -> Activations:
        """Run the step's next micro-batch through the client's blocks; begin a step if none has begun.

        Raises ProtocolError if all of the step is in flight.
        """
        self._in_round()
        if not self._sent and not self._unsent:
            self._unsent = self._split_step()
            self._parking.work([self.name])
        if not self._unsent:
            raise ProtocolError(f"{self.name}: all of step {self.steps} is underway; its gradient is due")
        micro_batch, batch = self._unsent[0]
        with torch.enable_grad():
            hidden = self.blocks.hidden(batch, "training", *micro_batch.place, step=micro_batch)
        self._sent[micro_batch.number] = sent = SentBatch(micro_batch, batch, hidden)
        del self._unsent[0]
        return sent.activations(self.blocks, training=True, numbered=self.setup.numbered)

    def head(self, message: Message) -> HeadGradient:
        """Compute the loss of a batch in flight and its gradient at the last hidden states.

        Raises RunError if the loss is not finite, ProtocolError for a second message to the same batch.
        """
        sent = self._in_flight(message)
        micro_batch = sent.micro_batch
        message = expect(message, LastHidden, step=self.steps)
        if sent.graded:  # a second gradient of the same labels would be a second look at them
            raise ProtocolError(f"{self.name}: LastHidden came twice; the gradient at the cut was due")
        sent.check_rows(self.name, message)
        last = message.hidden.to(self.segment.device)
        loss, gradient = grade(self.blocks, self._defence, micro_batch, sent.batch, last)
        sent.graded = True
        return HeadGradient(
            client=self.name,
            round=self._round,
            step=self.steps,
            micro_batch=micro_batch.number,
            loss=loss,
            gradient=micro_batch.weighted(gradient),
        )

    def repeat(self, message: Again) -> Activations:
        """Return the batch in flight as it left: the server has dropped it, and answers it once more."""
        sent = self._in_flight(expect(message, Again, step=self.steps))
        sent.look_again(self.name, self._defence.privacy)
        return sent.activations(self.blocks, training=True, numbered=self.setup.numbered)

    def backward(self, message: Message) -> None:
        """Run backward from the gradient at the cut; step the optimizer after the last micro-batch."""
        sent, optimizer = self._in_flight(message), self._in_round()
        expect(message, CutGradient if sent.graded or self.plan.labels == "server" else LastHidden)
        message = expect(message, CutGradient, step=self.steps)
        if message.gradient.shape != sent.hidden.shape:
            raise ProtocolError(f"CutGradient {tuple(message.gradient.shape)} for {sent.hidden.shape}")
        if sent.hidden.requires_grad:  # it does not if no layer of these blocks is adapted
            torch.autograd.backward([sent.hidden], [message.gradient.to(sent.hidden)])
        del self._sent[sent.micro_batch.number]
        if not self._sent and not self._unsent:
            optimizer.step()
            self._parking.rest(self.name)
            self.steps += 1

    def step_alone(self) -> StepTotals:
        """Take one step of a client that holds the whole model. Raises RunError if the loss is not finite."""
        optimizer, totals = self._in_round(), StepTotals()
        self._parking.work([self.name])
        for micro_batch, batch in self._split_step():
            with torch.enable_grad():
                last = pick(self.blocks.run(batch, micro_batch), batch.labelled)  # (M, D)
            loss, gradient = grade(self.blocks, self._defence, micro_batch, batch, last.detach())
            totals.add(micro_batch, loss)
            if last.requires_grad:
                torch.autograd.backward([last], [micro_batch.weighted(gradient).to(last.dtype)])
        optimizer.step()
        self._parking.rest(self.name)
        self.steps += 1
        self._tokens += totals.tokens
        return totals

    def upload(self) -> AdapterUpload:
        """End the round: return the factors that leave the client, and its moments if it hands them on."""
        moments = self._in_round().moments()
        handed_on = self._training.order == "in-turn"
        if self._training.optimizer_state == "keep" and not handed_on:
            self._moments = moments
        self._optimizer = None
        self._end_step()
        return AdapterUpload(
            client=self.name,
            round=self._round,
            adapters=self.blocks.trained(),
            moments=moments if handed_on else {},
            tokens=self._tokens,
        )

    # --- the global adapters ----------------------------------------------------------------------

    def install(self, message: Message) -> None:
        """Load the aggregated factors of the client's blocks, to evaluate and to begin the next round."""
        message = expect(message, GlobalAdapters)
        self.blocks.install(message.round, message.adapters, message.folded)
        self._round = message.round
        self.held_out.begin(message.round)

    # --- state for checkpoints --------------------------------------------------------------------

    def optimizer_state(self) -> tuple[int, Moments]:
        """Return the steps taken, and the optimizer's moments if they are kept across rounds."""
        return self.steps, self._moments

    def private(self) -> AdapterState:
        """Return the factors of the blocks that this client never uploads."""
        return self.blocks.private()

    def own(self) -> AdapterState:
        """Return the personal factors B, which never leave; none by most rules."""
        return self.blocks.own()

    def join(self, message: Join, moments: Moments, personal: AdapterState | None = None) -> None:
        """Join a run after some of its rounds, or again after an absence.

        `moments` and `personal` are what the client has kept: of its optimizer, and factors that never leave.
        """
        self._defence.check_cut(message.cut)
        own = personal or AdapterState()
        self.blocks.join(message.cut, message.round, message.adapters, message.folded, own)
        self.steps, self._moments = message.steps, moments
        self._round, self._optimizer = message.round, None
        self.held_out.begin(message.round)
        self._end_step()

    def restore(
        self, cut: int, known: AdapterState, steps: int, moments: Moments, folded: AdapterState | None = None
    ) -> None:
        """Restore a checkpoint; `known` are all factors of the client's blocks, private ones included."""
        self.blocks.restore(cut, known, folded or AdapterState())
        self.steps, self._moments = steps, moments

    # ----------------------------------------------------------------------------------------------

    def _split_step(self) -> list[tuple[MicroBatch, Batch]]:
        batch = self.setup.stream.batch(self.steps).to(self.segment.device)
        return split_batch(batch, self._training.micro_batches, self._round, self.steps)

    def _end_step(self) -> None:
        """Forget the current step, and leave the parking until the next round."""
        self._unsent, self._sent = [], {}
        self._parking.remove(self.name)

    def _in_round(self) -> LocalOptimizer:
        if self._optimizer is None:
            raise ProtocolError(f"{self.name}: no round is underway; RoundStart is due first")
        return self._optimizer

    def _in_flight(self, message: Message) -> SentBatch:
        """Return the micro-batch that a message answers."""
        number = getattr(message, "micro_batch", 0)
        if not self._sent:
            raise ProtocolError(f"{self.name}: a reply came, but no batch is underway")
        if number not in self._sent:
            raise ProtocolError(f"{self.name}: a reply came to micro-batch {number}, which is not underway")
        return self._sent[number]
