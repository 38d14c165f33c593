"""Read the labels, which are the text: as they are, or off the gradients that return.

    labels: server      the labels travel; whoever has them has the text
    labels: client      HeadGradient g (M, D) = 1/M d loss / d h, where h (M, D) is what the server sent

With logits z(h) = W norm(h) and loss logsumexp(z) - z_y, the gradient of one position is

    M g = d logsumexp(z) / d h  -  d z_y / d h

and the server can compute everything in it but y, for the head is public. So it subtracts the first term and
asks which row j_y of d z / d h is left in r = d logsumexp - M g. One product with the Jacobian gives r . j_y
for all V tokens, so those of least ||r - j_y||^2 = ||r||^2 - 2 r . j_y + ||j_y||^2 are known but for the
lengths ||j_y||, which differ between positions by little more than a factor (the norm's); the few best are
decided by their whole gradients. What is done to hidden states at the cut does not matter here: h is known in
any case. With noise on g, of known size and after known clipping, the model's own prediction is the prior:

    log p(y | g, h) = -||g - clip(g_y)||^2 / (2 s^2) + log softmax(z)_y

Where labels are randomised, this reads what was told, and Bayes' rule what it means (`randomised.believed`).

The gradient at the cut (N, D) is made by the server itself from g, so it adds nothing to what the server
knows. Who has only that, such as another party on the way, can still learn to read it: `CutReader`.

Gradients reveal labels: Zhao et al. 2020 (iDLG, arXiv 2001.02610); in split learning: Li et al. 2022
(arXiv 2102.08504).
Shapes: M labelled positions, N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from splitft.model.segment import Segment
from splitft.privacy.randomized_response import believed

CANDIDATES = 6
"""Labels whose whole gradient is computed, by each way of proposing them."""
CHUNK = 128
"""Positions looked at together; their logits are (CHUNK, V)."""


@dataclass(frozen=True)
class GradientObservationModel:
    """What is known of the way from the true gradient to the one that was seen."""

    deviation: float = 0.0
    """Standard deviation of the noise on one coordinate of the mean loss's gradient."""
    repeated: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows
    """Clipping, (M, D) -> (M, D)."""
    epsilon: float | None = None
    """Of randomised labels; None where labels are told as they are."""


def read_head_gradient(
    head: Segment,
    last: torch.Tensor,
    gradient: torch.Tensor,
    channel: GradientObservationModel = GradientObservationModel(),
) -> torch.Tensor:
    """The labels (M,) behind the gradients (M, D) of the mean loss at last hidden states (M, D)."""
    count = len(last)
    lengths = _squared_lengths(head, last[:1])
    parts = zip(torch.split(last, CHUNK), torch.split(gradient.float(), CHUNK), strict=True)
    return torch.cat([_chunk(head, rows, seen, count, lengths, channel) for rows, seen in parts])


def _chunk(
    head: Segment,
    last: torch.Tensor,
    seen: torch.Tensor,
    count: int,
    lengths: torch.Tensor,
    channel: GradientObservationModel,
) -> torch.Tensor:
    h = last.detach().requires_grad_()
    with torch.enable_grad():
        logits = head.logits(h)  # (M, V)
        wide = logits.float()
        spread = torch.autograd.grad(wide.logsumexp(-1).sum(), h, retain_graph=True)[0].float()
    left = spread - seen * count  # (M, D): d z_y / d h of the unknown y, and noise
    best_guess = wide.detach().argmax(-1, keepdim=True)
    one = torch.autograd.grad(wide.gather(1, best_guess).sum(), h, retain_graph=True)[0].float()
    products = torch.func.jvp(head.logits, (last,), (left.to(last.dtype),))[1].float()  # (M, V): r . j_y
    factor = one.square().sum(-1, keepdim=True) / lengths[best_guess].clamp_min(1e-30)
    scores = products - factor * lengths / 2  # minus half the squared distance, up to a constant
    prior = torch.log_softmax(wide.detach(), -1)
    proposals = [scores, prior]
    if channel.deviation:
        proposals.append(scores / (count * channel.deviation) ** 2 + prior)
    few = min(CANDIDATES, prior.shape[-1])
    candidates = torch.cat([one.topk(few).indices for one in proposals], 1)
    merits = []
    for column in candidates.T:
        own = torch.autograd.grad(wide.gather(1, column[:, None]).sum(), h, retain_graph=True)[0].float()
        distance = (seen - channel.repeated((spread - own) / count)).square().sum(-1)
        if channel.deviation:
            distance = distance / (2 * channel.deviation**2) - prior.gather(1, column[:, None])[:, 0]
        merits.append(-distance)
    best = torch.stack(merits, 1).argmax(-1, keepdim=True)
    told = candidates.gather(1, best)[:, 0]
    return told if channel.epsilon is None else believed(wide.detach(), told, channel.epsilon)


def _squared_lengths(head: Segment, last: torch.Tensor) -> torch.Tensor:
    """||d z_y / d h||^2 of every token (V,), at one hidden state (1, D)."""
    width = last.shape[-1]
    every = torch.eye(width, dtype=last.dtype)
    total = torch.zeros(head.shape.vocab)
    for part in torch.split(every, CHUNK):
        rows = last.repeat(len(part), 1)
        total += torch.func.jvp(head.logits, (rows,), (part,))[1].float().square().sum(0)
    return total


@dataclass(frozen=True)
class CutReader:
    """Reads labels off gradients at the cut alone, by a linear map learnt on public text."""

    weight: torch.Tensor
    """(D, D): direction of a gradient -> embedding of its label."""
    bias: torch.Tensor
    """(D,)."""
    embedding: torch.Tensor
    """(V, D)."""

    def read(self, gradient: torch.Tensor) -> torch.Tensor:
        """Gradients at the labelled positions of the cut (M, D) -> labels (M,)."""
        guess = functional.normalize(gradient.float(), dim=-1) @ self.weight + self.bias
        table = self.embedding
        return (guess @ table.T - table.square().sum(-1) / 2).argmax(-1)


def fit_cut_reader(
    gradient: torch.Tensor, labels: torch.Tensor, embedding: torch.Tensor, ridge: float = 1e-2
) -> CutReader:
    """Fit on public pairs (M, D), (M,): the gradient at a position, and the token it should predict."""
    x, target = functional.normalize(gradient.float(), dim=-1), embedding[labels]
    bias = target.mean(0)
    gram = x.T @ x / len(x)
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(gram.shape[0])
    return CutReader(torch.linalg.solve(gram, x.T @ (target - bias) / len(x)), bias, embedding)
