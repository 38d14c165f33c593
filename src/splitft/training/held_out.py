"""Evaluation of one client: the loss of the adapters it holds on its held-out text.

    forward(i) -> Activations --> server --> LastHidden --> head(...)     for each batch i, then result()

With labels on the server, it answers HeldOutLoss instead. A client that holds the whole model asks nobody
(`alone`). If the run protects labels, the result has noise (`privacy.held_out_loss`), and no accuracy: a
number of right predictions tells of labels too, and would need noise and a budget of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from splitft.data.text import Batch
from splitft.errors import ProtocolError
from splitft.model import held_out_sums, loss_and_gradient, pick, token_losses
from splitft.privacy.defence import Defence
from splitft.privacy.held_out_loss import bounded_sum
from splitft.protocol import Activations, Evaluation, HeldOutLoss, LastHidden, Message, expect
from splitft.training.client_blocks import ClientBlocks
from splitft.training.sent_batch import SentBatch, split_batch


class HeldOutEvaluator:
    """Held-out loss of one client, batch by batch."""

    def __init__(
        self, blocks: ClientBlocks, batches: Sequence[Batch], defence: Defence, numbered: bool
    ) -> None:
        """Evaluate on these batches; with `numbered`, send the numbers of their examples."""
        self._blocks, self._batches, self._numbered = blocks, tuple(batches), numbered
        self._defence = defence
        self.exact: Evaluation | None = None
        """The last result without noise, which stays at the client."""
        self._sent: SentBatch | None = None
        self.begin(0)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._batches)

    def begin(self, round: int) -> None:
        """Begin a new sum, of the adapters after this round."""
        self._round, self._tokens = round, 0
        self._correct: int | None = 0
        self._loss, self._bounded = 0.0, 0.0  # sums of losses as they are, and of losses that are bounded

    @torch.no_grad()
    def forward(self, index: int) -> Activations:
        """Run one batch through the client's blocks."""
        [(micro_batch, batch)] = split_batch(self._batch(index), 1, self._round, index)
        hidden = self._blocks.hidden(batch, "evaluation", *micro_batch.place)
        self._sent = SentBatch(micro_batch, batch, hidden)
        return self._sent.activations(self._blocks, training=False, numbered=self._numbered)

    @torch.no_grad()
    def alone(self, index: int) -> Batch:
        """Add the loss of one batch, at a client that holds the whole model; return the batch."""
        batch = self._batch(index)
        self._measure(pick(self._blocks.run(batch), batch.labelled), batch)
        return batch

    def head(self, message: Message) -> None:
        """Add the loss of the batch in flight."""
        sent = self._in_flight()
        expect(message, LastHidden if self._blocks.plan.labels == "client" else HeldOutLoss)
        if isinstance(message, LastHidden):
            sent.check_rows(self._blocks.name, message)
            self._measure(message.hidden, sent.batch)
        else:
            answer = expect(message, HeldOutLoss)
            self._add(answer.loss, answer.loss, answer.correct, sent.batch)
        self._sent = None

    def gradient(self, message: LastHidden) -> torch.Tensor:
        """Return the gradient (M, D) of the batch in flight at its last hidden states, to choose codecs by.

        If the run protects labels, it is that of random labels: which codec is chosen is public.
        """
        sent, segment = self._in_flight(), self._blocks.segment
        sent.check_rows(self._blocks.name, message)
        labels = sent.batch.targets()
        if self._defence.privacy.protects_labels:
            drawn = torch.randint(
                segment.shape.vocab, labels.shape, generator=torch.Generator().manual_seed(0)
            )
            labels = drawn.to(labels.device)
        return loss_and_gradient(segment, message.hidden, labels)[1].cpu()

    def result(self) -> Evaluation:
        """Return the loss of the batches so far as it may leave, and begin a new sum."""
        result = Evaluation(
            client=self._blocks.name,
            round=self._round,
            loss=self._loss,
            tokens=self._tokens,
            correct=self._correct,
        )
        self.exact = result
        if self._defence.privacy.protects_labels and self._tokens:
            width = self._blocks.segment.shape.width
            noised = self._defence.held_out_loss(self._bounded, width, self._round)
            result = result.model_copy(update={"loss": noised})
        self.begin(self._round)
        return result

    def _batch(self, index: int) -> Batch:
        return self._batches[index].to(self._blocks.segment.device)

    def _in_flight(self) -> SentBatch:
        if self._sent is None:
            raise ProtocolError(f"{self._blocks.name}: a reply came, but no batch is underway")
        return self._sent

    def _measure(self, last: torch.Tensor, batch: Batch) -> None:
        """Add the loss of a batch at its last hidden states (M, D)."""
        segment, targets = self._blocks.segment, batch.targets()
        if self._defence.privacy.protects_labels:
            losses = token_losses(segment, last, targets).cpu()
            self._add(float(losses.double().sum()), bounded_sum(losses), None, batch)
        else:
            loss, correct = held_out_sums(segment, last, targets)
            self._add(loss, loss, correct, batch)

    def _add(self, loss: float, bounded: float, correct: int | None, batch: Batch) -> None:
        self._loss, self._bounded = self._loss + loss, self._bounded + bounded
        self._correct = None if correct is None or self._correct is None else self._correct + correct
        self._tokens += batch.labelled_tokens
