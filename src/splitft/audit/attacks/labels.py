"""Read labels off the gradients that clients return. In language modelling the labels are the text.

    labels: server      the labels are sent, and with them the text
    labels: client      HeadGradient g (M, D) = 1/M d loss / d h, where h (M, D) is what the server sent

With logits z(h) = W norm(h) and loss logsumexp(z) - z_y, the gradient of one position is

    M g = d logsumexp(z) / d h  -  d z_y / d h

and the server can compute everything in it but y, since the head is public. So it subtracts the first term
and looks for the row j_y of d z / d h that remains in r = d logsumexp - M g. One product with the Jacobian
gives r . j_y for all V tokens, and with it the least ||r - j_y||^2 = ||r||^2 - 2 r . j_y + ||j_y||^2, except
for the lengths ||j_y||. These differ between positions by little more than a factor (the norm's), so whole
gradients are computed for the few best tokens only. Defences of hidden states at the cut do not matter here:
h is known in any case. With noise on g, of known size and after known clipping, the model's own prediction is
the prior:

    log p(y | g, h) = -||g - clip(g_y)||^2 / (2 s^2) + log softmax(z)_y

Where labels are randomised, this reads the randomised label, and `likeliest_labels` the true one by Bayes'
rule.

The gradient at the cut (N, D) is computed by the server itself from g, so it adds nothing to what the server
knows. A party that observes only that gradient can still learn to read it: `CutReader`.

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
from splitft.privacy.randomized_response import likeliest_labels

CANDIDATES = 6
"""Labels whose whole gradient is computed, for each way of proposing them."""
CHUNK = 128
"""Positions processed together; their logits are (CHUNK, V)."""


@dataclass(frozen=True)
class GradientObservationModel:
    """The known part of what happens to a gradient before it is observed."""

    deviation: float = 0.0
    """Standard deviation of the noise on one coordinate of the mean loss's gradient."""
    clip: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows
    """Clipping, (M, D) -> (M, D)."""
    epsilon: float | None = None
    """Epsilon of randomised labels; None if labels are not randomised."""


def read_head_gradient(
    head: Segment,
    last: torch.Tensor,
    gradient: torch.Tensor,
    model: GradientObservationModel = GradientObservationModel(),
) -> torch.Tensor:
    """Return the labels (M,) behind gradients (M, D) of the mean loss at last hidden states (M, D)."""
    count = len(last)
    lengths = _squared_lengths(head, last[:1])
    parts = zip(torch.split(last, CHUNK), torch.split(gradient.float(), CHUNK), strict=True)
    return torch.cat([_read_chunk(head, rows, observed, count, lengths, model) for rows, observed in parts])


def _read_chunk(
    head: Segment,
    last: torch.Tensor,
    observed: torch.Tensor,
    count: int,
    lengths: torch.Tensor,
    model: GradientObservationModel,
) -> torch.Tensor:
    # gradient of the loss but for its label
    h = last.detach().requires_grad_()
    with torch.enable_grad():
        logits = head.logits(h)  # (M, V)
        wide = logits.float()
        spread = torch.autograd.grad(wide.logsumexp(-1).sum(), h, retain_graph=True)[0].float()
    rest = spread - observed * count  # (M, D): d z_y / d h of the unknown y, and noise
    # candidates: the rows of the Jacobian nearest to the rest, and the likeliest tokens
    best_guess = wide.detach().argmax(-1, keepdim=True)
    one = torch.autograd.grad(wide.gather(1, best_guess).sum(), h, retain_graph=True)[0].float()
    products = torch.func.jvp(head.logits, (last,), (rest.to(last.dtype),))[1].float()  # (M, V): r . j_y
    factor = one.square().sum(-1, keepdim=True) / lengths[best_guess].clamp_min(1e-30)
    scores = products - factor * lengths / 2  # minus half the squared distance, up to a constant
    prior = torch.log_softmax(wide.detach(), -1)
    proposals = [scores, prior]
    if model.deviation:
        proposals.append(scores / (count * model.deviation) ** 2 + prior)
    few = min(CANDIDATES, prior.shape[-1])
    candidates = torch.cat([one.topk(few).indices for one in proposals], 1)
    # compare the whole gradient of each candidate
    merits = []
    for column in candidates.T:
        own = torch.autograd.grad(wide.gather(1, column[:, None]).sum(), h, retain_graph=True)[0].float()
        distance = (observed - model.clip((spread - own) / count)).square().sum(-1)
        if model.deviation:
            distance = distance / (2 * model.deviation**2) - prior.gather(1, column[:, None])[:, 0]
        merits.append(-distance)
    best = torch.stack(merits, 1).argmax(-1, keepdim=True)
    labels = candidates.gather(1, best)[:, 0]
    return labels if model.epsilon is None else likeliest_labels(wide.detach(), labels, model.epsilon)


def _squared_lengths(head: Segment, last: torch.Tensor) -> torch.Tensor:
    """Return ||d z_y / d h||^2 of every token (V,), at one hidden state (1, D)."""
    width = last.shape[-1]
    every = torch.eye(width, dtype=last.dtype)
    total = torch.zeros(head.shape.vocab)
    for part in torch.split(every, CHUNK):
        rows = last.repeat(len(part), 1)
        total += torch.func.jvp(head.logits, (rows,), (part,))[1].float().square().sum(0)
    return total


@dataclass(frozen=True)
class CutReader:
    """A linear map from gradients at the cut to labels, learnt on public text."""

    weight: torch.Tensor
    """(D, D): direction of a gradient -> embedding of its label."""
    bias: torch.Tensor
    """(D,)."""
    embedding: torch.Tensor
    """(V, D)."""

    def read(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the labels (M,) of gradients at the labelled positions of the cut (M, D)."""
        guess = functional.normalize(gradient.float(), dim=-1) @ self.weight + self.bias
        table = self.embedding
        return (guess @ table.T - table.square().sum(-1) / 2).argmax(-1)


def fit_cut_reader(
    gradient: torch.Tensor, labels: torch.Tensor, embedding: torch.Tensor, ridge: float = 1e-2
) -> CutReader:
    """Fit on public pairs (M, D), (M,): the gradient at a position and its label."""
    x, target = functional.normalize(gradient.float(), dim=-1), embedding[labels]
    bias = target.mean(0)
    gram = x.T @ x / len(x)
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(gram.shape[0])
    return CutReader(torch.linalg.solve(gram, x.T @ (target - bias) / len(x)), bias, embedding)
