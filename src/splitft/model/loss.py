"""Next-token loss at labelled positions, its gradient at the last hidden states, and KL divergence.

    hidden (M, D) -> final norm, output matrix -> logits (M, V) -> cross-entropy with targets (M,)

With V in the tens of thousands the logits need more memory than all else, so they are computed, used and
freed for a few hundred positions at a time (`geometry.head_positions`). The head is frozen: only the gradient
of the hidden states is needed, and it is available as soon as the chunk's loss is. Losses stay on the device
until all of them are there, since reading a number waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.nn import functional

from splitft.geometry import head_positions
from splitft.model.segment import Segment

Labelled = tuple[torch.Tensor, torch.Tensor]
"""Hidden states (M, D) at the last block, and their targets (M,)."""


def loss_and_gradient(
    segment: Segment, hidden: torch.Tensor, targets: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """Return the mean loss over M positions, and d loss / d hidden (M, D), on the segment's device."""
    [graded] = losses_and_gradients(segment, [(hidden, targets)])
    return graded


def losses_and_gradients(segment: Segment, batches: Sequence[Labelled]) -> list[tuple[float, torch.Tensor]]:
    """Return the mean loss and gradient of each batch; all losses are read from the device at once."""
    losses, gradients = [], []
    for hidden, targets in batches:
        graded = [_graded(segment, rows, wanted) for rows, wanted in _chunks(segment, hidden, targets)]
        losses.append([loss for loss, _ in graded])
        gradients.append(torch.cat([gradient for _, gradient in graded]))
    counts = [max(1, len(targets)) for _, targets in batches]
    return [
        (loss / count, gradient.div_(count))
        for loss, gradient, count in zip(_read_sums(losses), gradients, counts, strict=True)
    ]


def held_out_sums(segment: Segment, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[float, int]:
    """Return the sum of the loss over M positions, and how many of them are predicted right."""
    [sums] = sums_of_batches(segment, [(hidden, targets)])
    return sums


@torch.no_grad()
def sums_of_batches(segment: Segment, batches: Iterable[Labelled]) -> list[tuple[float, int]]:
    """Return the same of each batch; all are read from the device at once.

    A position is right if its most probable token is the target; of equally probable ones the first counts.
    """
    losses, right = [], []
    for hidden, targets in batches:
        parts = [_sums(segment, rows, wanted) for rows, wanted in _chunks(segment, hidden, targets)]
        losses.append([loss for loss, _ in parts])
        right.append([count for _, count in parts])
    sums = _read_sums([*losses, *right])
    return [(loss, round(count)) for loss, count in zip(sums, sums[len(losses) :], strict=False)]


def _sums(segment: Segment, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss and the right predictions of a few positions, on the device, in one type."""
    logits = _wide(segment.logits(hidden))
    loss = functional.cross_entropy(logits, targets, reduction="sum")
    return loss, (logits.argmax(1) == targets).sum().to(loss.dtype)


@torch.no_grad()
def token_losses(segment: Segment, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss at each of M positions, (M,), on the segment's device."""
    return torch.cat([
        functional.cross_entropy(_wide(segment.logits(rows)), wanted, reduction="none")
        for rows, wanted in _chunks(segment, hidden, targets)
    ])  # fmt: skip


@torch.no_grad()
def divergence(segment: Segment, hidden: torch.Tensor, other: torch.Tensor) -> float:
    """Return the mean Kullback-Leibler divergence, in nats, KL(hidden's || other's predictions), both (M, D).

    It is the rise of the loss from `hidden` to `other` if labels follow the predictions of `hidden`.
    """
    parts = []
    for one, two in _chunks(segment, hidden, other):
        wanted, found = (_wide(segment.logits(rows)).log_softmax(1) for rows in (one, two))
        parts.append(functional.kl_div(found, wanted, reduction="sum", log_target=True))
    [total] = _read_sums([parts])
    return total / max(1, len(hidden))


def _graded(
    segment: Segment, hidden: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss at a few positions, on the device, and its gradient (M, D).

    The gradient of the logits, softmax - one-hot, is made in the memory of the log-probabilities: autograd
    through the cross-entropy would keep one array of (M, V) more.
    """
    leaf = hidden.detach().requires_grad_()
    with torch.enable_grad():
        logits = segment.logits(leaf)
    with torch.no_grad():
        log_probabilities = _wide(logits).log_softmax(1)
        own = targets[:, None]
        loss = -log_probabilities.gather(1, own).sum()
        at_logits = log_probabilities.exp_()
        at_logits.scatter_add_(1, own, torch.full_like(own, -1, dtype=at_logits.dtype))
        at_logits = at_logits.to(logits.dtype)
    return loss, torch.autograd.grad(logits, leaf, at_logits)[0]


def _chunks(
    segment: Segment, hidden: torch.Tensor, other: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Move rows and what belongs to them to the segment's device; yield as many as the head takes at once."""
    size = head_positions(segment.shape.vocab, segment.dtype.itemsize)
    moved = (tensor.detach().to(segment.device) for tensor in (hidden, other))
    return zip(*(torch.split(tensor, size) for tensor in moved), strict=True)


def _read_sums(parts: Sequence[Sequence[torch.Tensor]]) -> list[float]:
    """Return the sum of each list of numbers, after one read from the device."""
    numbers = iter(torch.stack([number for one in parts for number in one]).cpu().tolist())
    return [sum(next(numbers) for _ in one) for one in parts]


def _wide(logits: torch.Tensor) -> torch.Tensor:
    """Return logits in float32 at least: bfloat16 is too coarse for a sum over V."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
