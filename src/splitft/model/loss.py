"""Next-token loss at labelled positions, its gradient at the last hidden states, and KL divergence.

    hidden (M, D) -> final norm, output matrix -> logits (M, V) -> cross-entropy with targets (M,)

With V in the tens of thousands the logits need more memory than all else, so they are computed, used and
freed for a few hundred positions at a time. The head is frozen: only the gradient of the hidden states is
needed, and it is available as soon as the chunk's loss is.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from splitft.model.segment import Segment

CHUNK = 256
"""Positions whose logits are in memory at one time."""


def loss_and_gradient(
    segment: Segment, hidden: torch.Tensor, targets: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """Return the mean loss over M positions, and d loss / d hidden (M, D)."""
    total, gradients = 0.0, []
    for chunk, wanted in zip(torch.split(hidden.detach(), CHUNK), torch.split(targets, CHUNK), strict=True):
        leaf = chunk.requires_grad_()
        with torch.enable_grad():
            loss = _summed(segment, leaf, wanted)
        gradients.append(torch.autograd.grad(loss, leaf)[0])
        total += float(loss.detach())
    count = max(1, len(targets))
    return total / count, torch.cat(gradients) / count


@torch.no_grad()
def summed_loss(segment: Segment, hidden: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the sum of the loss over M positions, without gradient."""
    chunks = zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True)
    return sum(float(_summed(segment, chunk, wanted)) for chunk, wanted in chunks)


@torch.no_grad()
def token_losses(segment: Segment, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss at each of M positions, (M,)."""
    chunks = zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True)
    return torch.cat([
        functional.cross_entropy(_wide(segment.logits(chunk)), wanted, reduction="none")
        for chunk, wanted in chunks
    ])  # fmt: skip


@torch.no_grad()
def divergence(segment: Segment, hidden: torch.Tensor, other: torch.Tensor) -> float:
    """Return the mean Kullback-Leibler divergence, in nats, KL(hidden's || other's predictions), both (M, D).

    It is the rise of the loss from `hidden` to `other` if labels follow the predictions of `hidden`.
    """
    total = 0.0
    for one, two in zip(torch.split(hidden, CHUNK), torch.split(other, CHUNK), strict=True):
        wanted, found = (_wide(segment.logits(rows)).log_softmax(1) for rows in (one, two))
        total += float(functional.kl_div(found, wanted, reduction="sum", log_target=True))
    return total / max(1, len(hidden))


def _summed(segment: Segment, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(_wide(segment.logits(hidden)), targets, reduction="sum")


def _wide(logits: torch.Tensor) -> torch.Tensor:
    """Return logits in float32 at least: bfloat16 is too coarse for a sum over V."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
