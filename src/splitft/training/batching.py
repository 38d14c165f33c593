"""Which clients' batches the server works on together, and what it keeps of them until their gradients come.

    batches in order of length  ->  groups of like lengths, each up to `group_tokens` padded tokens

Larger products use a processor better, but all rows of a group are padded to its longest sequence: that is
work which grouping must first win back (`benchmarks/server_batching.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from splitft.errors import ProtocolError
from splitft.protocol import Activations, HeadGradient, expect
from splitft.seeds import Draw

MOST_PADDING = 1.25
"""Padded tokens of a group over those of its clients' own batches, at most."""


@dataclass
class Group:
    """A batch of several clients between forward and backward."""

    leaves: dict[str, torch.Tensor] = field(default_factory=dict)
    """(B, T, D) by client, as it came in."""
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    """(M, D) by client, with the graph."""
    messages: dict[str, Activations] = field(default_factory=dict)
    """What each client sent."""

    def check(self, message: HeadGradient) -> None:
        """Raise ProtocolError for a gradient that does not answer what is underway here."""
        awaited = self.messages[message.client]
        expect(message, HeadGradient, round=awaited.round, step=awaited.step)
        if message.gradient.shape != self.outputs[message.client].shape:
            raise ProtocolError(f"{message.client}: gradient {tuple(message.gradient.shape)} does not fit")


def of_step(message: Activations, gradient: torch.Tensor) -> torch.Tensor:
    """From the gradient of a micro-batch's own mean loss to that of its step's mean loss."""
    if message.micro_batches == 1:
        return gradient
    return gradient * (message.labelled_tokens / message.step_tokens)


def group_by_length(messages: Sequence[Activations], group_tokens: int) -> list[list[Activations]]:
    """Neighbours in length together, up to `group_tokens` padded tokens and `MOST_PADDING`."""
    groups: list[list[Activations]] = []
    for message in sorted(messages, key=lambda one: (max(one.lengths), one.client)):
        candidate = [*(groups[-1] if groups else []), message]
        apart = sum(len(one.lengths) * max(one.lengths) for one in candidate)
        together = sum(len(one.lengths) for one in candidate) * max(message.lengths)
        if groups and together <= min(group_tokens, MOST_PADDING * apart):
            groups[-1].append(message)
        else:
            groups.append([message])
    return groups


def in_random_order(messages: Sequence[Activations], seed: Sequence[int]) -> list[list[Activations]]:
    """Each by itself, in an order drawn anew for each step (SplitFedV2, arXiv 2004.12088)."""
    order = Draw.TURN.generator(*seed).permutation(len(messages))
    return [[messages[place]] for place in order]


def merge_runs(rows: Sequence[tuple[str | None, int]]) -> list[tuple[str | None, int]]:
    """(slot, sequences) of a batch's rows, neighbours with the same slot as one."""
    runs: list[tuple[str | None, int]] = []
    for slot, count in rows:
        if runs and runs[-1][0] == slot:
            runs[-1] = (slot, runs[-1][1] + count)
        else:
            runs.append((slot, count))
    return runs
