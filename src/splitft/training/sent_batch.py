"""A client's batches: split into micro-batches, and kept while the server works on their hidden states.

Batch --split_batch--> (MicroBatch, Batch), ...
SentBatch(micro_batch, batch, hidden) --activations--> Activations     leaves; tokens never do
                                        the batch and its graph are on the device; what travels is on the CPU
LastHidden --check_rows--> the client's head: grade(...) -> loss, gradient at the last hidden states
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from splitft.data.text import Batch
from splitft.errors import ProtocolError
from splitft.model import loss_and_gradient
from splitft.privacy.defence import Defence
from splitft.protocol import Activations, LastHidden
from splitft.specs import PrivacySpec
from splitft.training.client_blocks import ClientBlocks
from splitft.training.micro_batch import MicroBatch, check_finite


def split_batch(batch: Batch, parts: int, round: int, step: int) -> list[tuple[MicroBatch, Batch]]:
    """Split a step's batch into at most `parts` micro-batches."""
    batches = batch.divided(parts)
    return [
        (
            MicroBatch(
                round=round,
                step=step,
                number=number,
                of=len(batches),
                sequences=len(one.lengths),
                labelled=one.labelled_tokens,
                step_labelled=batch.labelled_tokens,
            ),
            one,
        )
        for number, one in enumerate(batches)
    ]


@dataclass
class SentBatch:
    """A batch at its client, from the moment its hidden states leave until its gradient arrives."""

    micro_batch: MicroBatch
    batch: Batch
    hidden: torch.Tensor
    """(N, D) at the cut as it left, with its graph in training."""
    graded: bool = False
    """True if the client's head has computed the loss and its gradient."""

    def activations(self, blocks: ClientBlocks, *, training: bool, numbered: bool) -> Activations:
        """Return the message to the server: never tokens, and labels only if the server computes the loss."""
        batch, micro_batch = self.batch, self.micro_batch
        return Activations(
            client=blocks.name,
            round=micro_batch.round,
            step=micro_batch.step,
            training=training,
            lengths=batch.lengths,
            labelled=batch.labelled,
            examples=batch.numbers if numbered else (),
            micro_batch=micro_batch.number,
            micro_batches=micro_batch.of,
            step_labelled=micro_batch.step_labelled if micro_batch.of > 1 else None,
            hidden=self.hidden.detach(),
            labels=batch.targets().cpu() if blocks.plan.labels == "server" else None,
        )

    def look_again(self, client: str, privacy: PrivacySpec) -> None:
        """Let the head compute another gradient. Raises ProtocolError if the run protects labels."""
        if privacy.protects_labels:  # noise is accounted for one look at the labels of a step
            raise ProtocolError(f"{client}: the server asks for a step again, and this run protects labels")
        self.graded = False

    def check_rows(self, client: str, message: LastHidden) -> None:
        """Raise ProtocolError unless the message has one row for each labelled token."""
        expected = self.micro_batch.labelled
        if len(message.hidden) != expected:
            raise ProtocolError(f"{client}: LastHidden has {len(message.hidden)} rows, {expected} were due")


def grade(
    blocks: ClientBlocks, defence: Defence, micro_batch: MicroBatch, batch: Batch, last: torch.Tensor
) -> tuple[float | None, torch.Tensor]:
    """Return the mean loss, None if labels are protected, and the defended gradient (M, D) at `last`."""
    place, segment = micro_batch.place, blocks.segment
    labels = defence.labels(batch.targets(), last, segment.logits, *place)
    loss, gradient = loss_and_gradient(segment, last, labels)
    check_finite(loss, blocks.name, micro_batch)
    gradient = defence.gradient(
        gradient,
        last,
        segment.shape.vocab,
        lambda rows, labels: loss_and_gradient(segment, rows, labels)[1],
        *place,
    )
    return (None if defence.privacy.protects_labels else loss), gradient
