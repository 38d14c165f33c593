"""A client's batch between its hidden states, which have left, and the answer to them.

    Underway(batch, hidden) --activations--> Activations(lengths, labelled, hidden)    leaves
    LastHidden, loss        --check_rows, check_finite-->                              comes, and is looked at

The batch itself, its tokens, stays here until the answer has come.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from splitft.data.text import Batch
from splitft.errors import ProtocolError, RunError
from splitft.protocol import Activations, LastHidden


@dataclass(frozen=True)
class Underway:
    """A batch whose hidden states have left and whose gradient has not come back."""

    batch: Batch
    hidden: torch.Tensor
    """(N, D) at the cut, as it leaves, with its graph if it is trained on."""

    def activations(
        self, client: str, round: int, step: int, *, training: bool, numbered: bool, with_labels: bool
    ) -> Activations:
        """What leaves: never tokens, and labels only with `with_labels`."""
        batch = self.batch
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
            hidden=self.hidden.detach(),
            labels=batch.targets() if with_labels else None,
        )

    def check_rows(self, client: str, message: LastHidden) -> None:
        """Raise ProtocolError unless there is a row for every label."""
        due = self.batch.labelled_tokens
        if len(message.hidden) != due:
            raise ProtocolError(f"{client}: LastHidden has {len(message.hidden)} rows, {due} were due")


def check_finite(loss: float, client: str, round: int, step: int) -> None:
    """Raise RunError for a loss that training cannot go on from."""
    if not math.isfinite(loss):
        raise RunError(
            f"{client}: the loss is {loss} at step {step} of round {round}; "
            "lower training.lr, or look at the client's text"
        )
