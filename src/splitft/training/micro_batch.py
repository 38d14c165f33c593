"""A client's batch between its hidden states, which have left, and the answer to them.

    MicroBatch(batch, hidden) --activations--> Activations(lengths, labelled, hidden)    leaves
    LastHidden, loss        --check_rows, check_finite-->                              comes, and is looked at

The batch itself, its tokens, stays here until the answer has come.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from splitft.data.text import Batch
from splitft.errors import ProtocolError, RunError
from splitft.protocol import Activations, LastHidden


@dataclass(frozen=True)
class BatchPart:
    """A micro-batch's place in its step."""

    number: int = 0
    """From 0."""
    of: int = 1
    """Micro-batches of the step."""
    step_labelled: int = 0
    """Labelled tokens of them all."""

    def weighted(self, gradient: torch.Tensor, labelled: int) -> torch.Tensor:
        """From the gradient of the mean loss over its own labels to that of the step's mean loss.

        The parts' gradients then add up: sum_j (M_j / M) grad_j.
        """
        return gradient if self.of == 1 else gradient * (labelled / self.step_labelled)


@dataclass(frozen=True)
class MicroBatch:
    """A batch whose hidden states have left and whose gradient has not come back."""

    batch: Batch
    hidden: torch.Tensor
    """(N, D) at the cut, as it leaves, with its graph if it is trained on."""
    part: BatchPart = BatchPart()
    """Which of its step it is."""

    def activations(
        self, client: str, round: int, step: int, *, training: bool, numbered: bool, with_labels: bool
    ) -> Activations:
        """What leaves: never tokens, and labels only with `with_labels`."""
        batch, part = self.batch, self.part
        starts = [first - 1 for first in batch.labelled_from]
        stops = [length - 1 for length in batch.lengths]
        return Activations(
            client=client,
            round=round,
            step=step,
            training=training,
            lengths=batch.lengths,
            labelled=tuple(zip(starts, stops, strict=True)),
            examples=batch.numbers if numbered else (),
            micro_batch=part.number,
            micro_batches=part.of,
            step_labelled=part.step_labelled if part.of > 1 else None,
            hidden=self.hidden.detach(),
            labels=batch.targets() if with_labels else None,
        )

    def check_rows(self, client: str, message: LastHidden) -> None:
        """Raise ProtocolError unless there is a row for every label."""
        due = self.batch.labelled_tokens
        if len(message.hidden) != due:
            raise ProtocolError(f"{client}: LastHidden has {len(message.hidden)} rows, {due} were due")


class StepTotals:
    """What the micro-batches of one step come to, as they are done."""

    def __init__(self) -> None:
        self._losses: list[tuple[float, int]] = []
        self.examples = 0
        """Sequences so far."""

    def add(self, message: Activations, loss: float) -> bool:
        """One is done, with this mean loss; whether it was the last."""
        self._losses.append((loss, message.labelled_tokens))
        self.examples += len(message.lengths)
        return len(self._losses) == message.micro_batches

    @property
    def tokens(self) -> int:
        """Labelled tokens so far."""
        return sum(labelled for _, labelled in self._losses)

    @property
    def loss(self) -> float:
        """Mean over them."""
        return mean_loss(self._losses)


def mean_loss(parts: Sequence[tuple[float, int]]) -> float:
    """Mean loss of a step, of (mean loss, labelled tokens) of its micro-batches."""
    if len(parts) == 1:
        return parts[0][0]
    return sum(loss * labelled for loss, labelled in parts) / sum(labelled for _, labelled in parts)


def check_finite(loss: float, client: str, round: int, step: int) -> None:
    """Raise RunError for a loss that training cannot go on from."""
    if not math.isfinite(loss):
        raise RunError(
            f"{client}: the loss is {loss} at step {step} of round {round}; "
            "lower training.lr, or look at the client's text"
        )
