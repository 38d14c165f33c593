"""Evaluation of one client: the loss of the adapters it holds on its held-out text.

    forward(i) -> Activations --> server --> LastHidden --> head(...)     for each batch i, then result()

With labels on the server, it answers HeldOutLoss instead. A client that holds the whole model asks nobody
(`alone`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from splitft.data.text import Batch
from splitft.errors import ProtocolError
from splitft.model import loss_and_gradient, summed_loss
from splitft.protocol import Activations, Evaluation, HeldOutLoss, LastHidden, Message, expect
from splitft.training.client_blocks import ClientBlocks
from splitft.training.sent_batch import SentBatch, split_batch


class HeldOutEvaluator:
    """Held-out loss of one client, batch by batch."""

    def __init__(self, blocks: ClientBlocks, batches: Sequence[Batch], numbered: bool) -> None:
        """Evaluate on these batches; with `numbered`, send the numbers of their examples."""
        self._blocks, self._batches, self._numbered = blocks, tuple(batches), numbered
        self._sent: SentBatch | None = None
        self.begin(0)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._batches)

    def begin(self, round: int) -> None:
        """Begin a new sum, of the adapters after this round."""
        self._round, self._loss, self._tokens = round, 0.0, 0

    @torch.no_grad()
    def forward(self, index: int) -> Activations:
        """Run one batch through the client's blocks."""
        [(micro_batch, batch)] = split_batch(self._batches[index], 1, self._round, index)
        hidden = self._blocks.hidden(batch, "evaluation", *micro_batch.place)
        self._sent = SentBatch(micro_batch, batch, hidden)
        return self._sent.activations(self._blocks, training=False, numbered=self._numbered)

    @torch.no_grad()
    def alone(self, index: int) -> None:
        """Add the loss of one batch, at a client that holds the whole model."""
        batch = self._batches[index]
        last = self._blocks.run(batch)[batch.positions()]
        self._add(summed_loss(self._blocks.segment, last, batch.targets()), batch)

    def head(self, message: Message) -> None:
        """Add the loss of the batch in flight."""
        sent = self._in_flight()
        expect(message, LastHidden if self._blocks.plan.labels == "client" else HeldOutLoss)
        if isinstance(message, LastHidden):
            sent.check_rows(self._blocks.name, message)
            self._add(summed_loss(self._blocks.segment, message.hidden, sent.batch.targets()), sent.batch)
        else:
            self._add(expect(message, HeldOutLoss).loss, sent.batch)
        self._sent = None

    def gradient(self, message: LastHidden) -> torch.Tensor:
        """Return the gradient (M, D) of the batch in flight at its last hidden states."""
        sent = self._in_flight()
        sent.check_rows(self._blocks.name, message)
        return loss_and_gradient(self._blocks.segment, message.hidden, sent.batch.targets())[1]

    def result(self) -> Evaluation:
        """Return the loss of the batches so far, and begin a new sum."""
        result = Evaluation(client=self._blocks.name, round=self._round, loss=self._loss, tokens=self._tokens)
        self.begin(self._round)
        return result

    def _in_flight(self) -> SentBatch:
        if self._sent is None:
            raise ProtocolError(f"{self._blocks.name}: a reply came, but no batch is underway")
        return self._sent

    def _add(self, loss: float, batch: Batch) -> None:
        self._loss, self._tokens = self._loss + loss, self._tokens + batch.labelled_tokens
