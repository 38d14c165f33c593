"""What a curious server observes of a run: the messages of one batch, decoded.

    recorded frames --decode as the server does--> messages --group by batch--> Observation

    up    Activations   hidden at the cut (N, D), lengths, labelled positions, labels if they travel
    down  LastHidden    last hidden states (M, D), which the server made itself
    up    HeadGradient  d loss / d last hidden (M, D), which depends on the labels, and the mean loss if sent
    down  CutGradient   d loss / d hidden at the cut (N, D)

An attack gets this and nothing of a client's internal state. All else that it knows is public or the server's
own: the base model, the global adapters, the codecs and the defences' settings (not their random numbers).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Observation:
    """One batch of one client, as the server receives it."""

    client: str
    step: int
    training: bool
    """True for training, False for evaluation."""
    lengths: tuple[int, ...]
    """Real tokens of each sequence."""
    labelled: tuple[tuple[int, int], ...]
    """Positions [start, stop) of each sequence that carry a label."""
    hidden: torch.Tensor
    """(N, D) at the cut, decoded."""
    labels: torch.Tensor | None = None
    """(M,) token ids, if labels are sent to the server."""
    last: torch.Tensor | None = None
    """(M, D) last hidden states, as sent to the client."""
    head_gradient: torch.Tensor | None = None
    """(M, D) gradient of the mean loss at `last`; None for evaluation."""
    cut_gradient: torch.Tensor | None = None
    """(N, D) gradient of the mean loss at the cut; None for evaluation."""
    mean_loss: float | None = None
    """Mean loss of the batch in nats, if the client sends it."""

    def sequences(self) -> tuple[torch.Tensor, ...]:
        """Split `hidden` by sequence, (T_b, D) each."""
        return torch.split(self.hidden, list(self.lengths))

    def by_sequence(self, labels: torch.Tensor) -> list[list[int]]:
        """Split labels (M,) into the labelled part of each sequence."""
        return [
            part.tolist() for part in torch.split(labels, [stop - start for start, stop in self.labelled])
        ]

    def labelled_rows(self) -> torch.Tensor:
        """Return the indices (M,) of the N rows that carry a label."""
        starts = [0, *torch.tensor(self.lengths).cumsum(0).tolist()]
        return torch.cat([
            torch.arange(offset + start, offset + stop)
            for offset, (start, stop) in zip(starts, self.labelled, strict=False)
        ])  # fmt: skip
