"""Micro-batches: the parts of a client's step, as both sides know them.

    batch of B sequences --split--> micro-batches 0, 1, ...     M_j labelled tokens each, M in all
    gradient of micro-batch j's mean loss --weighted--> (M_j / M) grad_j;   their sum is the step's gradient

`StepTotals` sums up the micro-batches that are finished.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from splitft.errors import RunError
from splitft.protocol import Activations
from splitft.tracking.events import StepDone, Traffic


@dataclass(frozen=True)
class MicroBatch:
    """One part of a client's step: where it stands and what it counts."""

    round: int
    step: int
    """Step of the client over the whole run, from 0; in evaluation the index of the batch."""
    number: int
    """Position within the step, from 0."""
    of: int
    """Micro-batches of the step."""
    sequences: int
    labelled: int
    """M_j: its labelled tokens."""
    step_labelled: int
    """M: labelled tokens of the whole step."""

    @classmethod
    def of_message(cls, message: Activations) -> MicroBatch:
        """Return the micro-batch that the client announces."""
        return cls(
            round=message.round,
            step=message.step,
            number=message.micro_batch,
            of=message.micro_batches,
            sequences=len(message.lengths),
            labelled=message.labelled_tokens,
            step_labelled=message.step_tokens,
        )

    def weighted(self, gradient: torch.Tensor) -> torch.Tensor:
        """Turn the gradient of its own mean loss into its part of the gradient of the step's mean loss."""
        return gradient if self.of == 1 else gradient * (self.labelled / self.step_labelled)

    @property
    def place(self) -> tuple[int, ...]:
        """Words of its noise seed; those of an undivided step are (round, step)."""
        return (self.round, self.step, self.number) if self.number else (self.round, self.step)


@dataclass
class StepTotals:
    """Sums over the finished micro-batches of one step."""

    finished: list[tuple[MicroBatch, float | None]] = field(default_factory=list)
    """Each with its mean loss, or None if it was not reported."""

    def add(self, micro_batch: MicroBatch, loss: float | None) -> bool:
        """Add a finished micro-batch with its mean loss; return whether the step is complete."""
        self.finished.append((micro_batch, loss))
        return len(self.finished) == micro_batch.of

    @property
    def tokens(self) -> int:
        """Labelled tokens."""
        return sum(one.labelled for one, _ in self.finished)

    @property
    def loss(self) -> float | None:
        """Mean loss over the labelled tokens; None if it was not reported."""
        if len(self.finished) == 1:
            return self.finished[0][1]
        known = [loss * one.labelled for one, loss in self.finished if loss is not None]
        return sum(known) / self.tokens if len(known) == len(self.finished) else None

    def event(self, client: str, seconds: Mapping[str, float], traffic: Traffic | None = None) -> StepDone:
        """Return the event of the completed step; `seconds` are by leg."""
        first = self.finished[0][0]
        return StepDone(
            round=first.round,
            step=first.step,
            client=client,
            loss=self.loss,
            tokens=self.tokens,
            examples=sum(one.sequences for one, _ in self.finished),
            seconds={leg: round(spent, 6) for leg, spent in seconds.items()},
            traffic=traffic or Traffic(),
        )


def check_finite(loss: float, client: str, micro_batch: MicroBatch) -> None:
    """Raise RunError if the loss is NaN or infinite."""
    if not math.isfinite(loss):
        raise RunError(
            f"{client}: the loss is {loss} at step {micro_batch.step} of round {micro_batch.round}; "
            "lower training.lr, or look at the client's text"
        )
