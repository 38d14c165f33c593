"""Read labels off the exact mean loss of a batch, which is one number about all its labels.

    last hidden (M, D) --public head--> loss of every token at every position (M, V)
    mean loss x M = sum of M of these, one a position --try combinations--> labels (M,)

The server sent the last hidden states, so it can compute the loss that each possible label would have. With
one label (M = 1) it looks the observed loss up among V: the label is read for certain, unless two tokens have
the same loss in the last digit. With several, it tries combinations of the likeliest tokens, up to
COMBINATIONS of them, and takes those whose sum is the observed one to rounding. All such combinations are
equally likely under the model, because a sum of losses *is* the logarithm of a combination's probability; so
each position gets the token that most of them have there. A loss has some 20 bits, so more combinations would
not tell more: 1,000 tokens at each of two positions, or two at each of 20. If no combination fits, the
likeliest tokens are returned, as `prediction` does.

Shapes: M labelled positions, D width, V vocabulary, K candidates of a position.
"""

from __future__ import annotations

import heapq
import math

import torch

from splitft.model.segment import Segment

COMBINATIONS = 2**20
"""Most combinations that are tried."""
ROUNDING = 2e-7
"""Relative error of a sum of losses in float32."""


@torch.no_grad()
def read_mean_loss(head: Segment, last: torch.Tensor, mean_loss: float) -> torch.Tensor:
    """Return labels (M,) whose losses at last hidden states (M, D) have this mean."""
    logits = head.logits(last)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).double()
    losses = wide.logsumexp(-1, keepdim=True) - wide  # (M, V)
    total = mean_loss * len(last)
    if len(last) == 1:
        return (losses - total).abs().argmin(-1)
    # candidates of each position, the likeliest first
    ordered = losses.sort(-1)
    counts = candidate_counts(ordered.values, COMBINATIONS)
    values = [row[:count] for row, count in zip(ordered.values, counts, strict=True)]
    tokens = [row[:count] for row, count in zip(ordered.indices, counts, strict=True)]
    # combinations whose sum fits, as indices of the flattened sums
    sums = torch.zeros(1, dtype=torch.float64)
    for row in values:
        sums = (sums[:, None] + row).flatten()
    scale = float(wide.abs().amax(-1).sum())
    fitting = ((sums - total).abs() <= ROUNDING * max(scale, abs(total))).nonzero()[:, 0]
    if not len(fitting):
        return ordered.indices[:, 0]
    # the token that most of them have at each position
    read = []
    for own in reversed(tokens):
        chosen = fitting % len(own)
        read.append(own[torch.bincount(chosen, minlength=len(own)).argmax()])
        fitting = fitting // len(own)
    return torch.stack(read[::-1])


def candidate_counts(ordered: torch.Tensor, combinations: int) -> list[int]:
    """Return how many tokens to try at each position, given losses (M, V) in ascending order.

    The next candidate is always the likeliest that is left anywhere, while their product allows it.
    """
    counts, product = [1] * len(ordered), 1
    waiting = [(float(row[1]), place) for place, row in enumerate(ordered)]
    heapq.heapify(waiting)
    while waiting:
        _, place = heapq.heappop(waiting)
        more = product // counts[place] * (counts[place] + 1)
        if more > combinations:
            continue  # this position has all that it can have; others have fewer candidates
        counts[place], product = counts[place] + 1, more
        if counts[place] < ordered.shape[-1]:
            heapq.heappush(waiting, (float(ordered[place, counts[place]]), place))
    assert math.prod(counts) == product
    return counts
