"""Compute the loss and the token accuracy of a whole model on text.

    batches --likelihood--> nats per labelled token, share of them predicted right, labelled tokens

Shapes: B sequences, T tokens, V vocabulary, N labelled positions. Perplexity is e to the loss. Those
of different tokenizers do not compare, nor those of different divisions of one text (examples, windows).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from splitft.data.text import Batch, Example

CHUNK = 256
"""Positions whose float32 logits are in memory at one time."""


@dataclass(frozen=True)
class Likelihood:
    """The labelled tokens of some text under a model."""

    loss: float
    """Mean loss, in nats."""
    accuracy: float
    """Share of them that are the most probable tokens."""
    tokens: int
    """Their number."""


@torch.inference_mode()
def likelihood(model: Any, batches: Sequence[Batch], advance: Callable[[int], None]) -> Likelihood:
    """Return loss and accuracy over all labelled tokens of all batches."""
    total, right, count = 0.0, 0, 0
    for batch in batches:
        mask = torch.arange(batch.tokens.shape[1]) < torch.tensor(batch.lengths)[:, None]  # (B, T)
        logits = model(
            input_ids=batch.tokens, attention_mask=mask.long(), use_cache=False
        ).logits  # (B, T, V)
        labelled, targets = logits[batch.positions()], batch.targets()  # (N, V), (N,)
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            total += float(functional.cross_entropy(labelled[part].float(), targets[part], reduction="sum"))
            right += int((labelled[part].argmax(1) == targets[part]).sum())
        count += len(targets)
        advance(len(batch.lengths))
    return Likelihood(total / count, right / count, count)


def windows(tokens: Sequence[int], size: int) -> list[Example]:
    """Divide a long text into windows of `size` tokens without overlap; omit a last one of a single token.

    Every token but the first of each window is predicted, so a longer window gives a lower loss.
    """
    parts = [tuple(tokens[start : start + size]) for start in range(0, len(tokens), size)]
    return [Example(part) for part in parts if len(part) > 1]
