"""Learn on public text to read tokens off hidden states, and read private ones with it.

    public tokens --public model--> hidden at the cut (N, D) --fit--> inverter --> private hidden -> tokens

`Linear`: ridge regression of a token's input embedding e on its hidden state h, with noise of known size
counted in; then the likeliest token under a normal error of the regression's own covariance,

    log p(v | h) = -1/2 (e_v - W h)' S^-1 (e_v - W h) + const

Since it predicts embeddings and not classes, it also reads tokens that the public text never had.

`Context`: a small transformer over the whole sequence that corrects the linear guess, trained by
cross-entropy over a sample of the vocabulary on noisy hidden states. Both follow the first stage
of BiSR (2024, arXiv 2409.00960), a learned inversion trained on public data; the linear one in closed form.

Shapes: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

RIDGE = 1e-3
"""Ridge, as a share of the mean variance of the standardised inputs."""
NEGATIVES = 2048
"""Tokens sampled against the right ones in a step of training."""


@dataclass(frozen=True)
class Linear:
    """The linear inverter, in a space where its error is white."""

    mean: torch.Tensor
    """(D,) of hidden states."""
    scale: torch.Tensor
    """(D,) their standard deviation."""
    weight: torch.Tensor
    """(D, D): standardised hidden state -> embedding."""
    bias: torch.Tensor
    """(D,)."""
    whitener: torch.Tensor
    """(D, D): S^-1/2, embedding -> white."""
    table: torch.Tensor
    """(V, D): embeddings, white."""

    def embedded(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, D) -> guessed embeddings, white, (N, D)."""
        return (self.bias + ((hidden - self.mean) / self.scale) @ self.weight) @ self.whitener

    def step(self, difference: torch.Tensor) -> torch.Tensor:
        """A difference of hidden states as one of white embeddings, both (..., D)."""
        return (difference / self.scale) @ self.weight @ self.whitener

    def scores(self, white: torch.Tensor) -> torch.Tensor:
        """White embeddings (N, D) -> log-probabilities of tokens (N, V)."""
        return torch.log_softmax(white @ self.table.T - self.table.square().sum(-1) / 2, -1)

    def logits(self, sequence: torch.Tensor) -> torch.Tensor:
        """Hidden states of one sequence (T, D) -> log-probabilities (T, V)."""
        return self.scores(self.embedded(sequence))


def fit_linear(
    hidden: torch.Tensor, tokens: torch.Tensor, embedding: torch.Tensor, deviation: float = 0.0
) -> Linear:
    """Fit on public pairs (N, D), (N,); noise of this deviation will be on what is to be read."""
    hidden, target = hidden.float(), embedding[tokens]
    mean, bias = hidden.mean(0), target.mean(0)
    scale = (hidden.var(0) + deviation**2).sqrt().clamp_min(1e-6)
    x, y = (hidden - mean) / scale, target - bias
    count, width = x.shape
    noise = (deviation / scale).square()
    gram = x.T @ x / count + torch.diag(noise) + RIDGE * torch.eye(width)
    weight = torch.linalg.solve(gram, x.T @ y / count)
    error = y - x @ weight
    covariance = error.T @ error / count + weight.T @ torch.diag(noise) @ weight
    covariance += 1e-2 * covariance.diagonal().mean() * torch.eye(width)
    values, vectors = torch.linalg.eigh(covariance)
    whitener = vectors @ torch.diag(values.clamp_min(1e-12).rsqrt()) @ vectors.T
    return Linear(mean, scale, weight, bias, whitener, embedding @ whitener)


class Context(nn.Module):
    """A transformer over the sequence on top of a linear inverter."""

    def __init__(self, linear: Linear, width: int = 256, layers: int = 2) -> None:
        super().__init__()
        self.linear = linear
        size = len(linear.mean)
        # neighbours tell where a token is: attention alone knows no order
        self.enter = nn.Conv1d(2 * size, width, kernel_size=5, padding=2)
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 64), 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.mixer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.leave = nn.Linear(width, size)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, hidden: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T, D) -> white embeddings (B, T, D)."""
        guess = self.linear.embedded(hidden)
        standard = (hidden - self.linear.mean) / self.linear.scale
        typical = guess.square().mean().sqrt().detach() + 1e-6
        x = self.enter(torch.cat([standard, guess / typical], -1).mT).mT
        correction: torch.Tensor = self.leave(self.mixer(x, src_key_padding_mask=padding))
        return guess + typical * correction

    @torch.no_grad()
    def logits(self, sequence: torch.Tensor) -> torch.Tensor:
        """Hidden states of one sequence (T, D) -> log-probabilities (T, V)."""
        return self.linear.scores(self(sequence[None])[0])


def fit_context(
    linear: Linear,
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    generator: torch.Generator,
    deviation: float = 0.0,
    steps: int = 150,
    lr: float = 1e-3,
    batch: int = 8,
    width: int = 256,
) -> Context:
    """Train on public sequences (B, T, D), (B, T) of one length, with fresh noise in each step."""
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        context = Context(linear, width)
    optimizer = torch.optim.AdamW(context.parameters(), lr=lr, weight_decay=0.01)
    vocab = len(linear.table)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * (1 - step / steps)
        rows = torch.randint(len(hidden), (batch,), generator=generator)
        x, wanted = hidden[rows].float(), tokens[rows].flatten()
        if deviation:
            x = x + deviation * torch.randn(x.shape, generator=generator)
        present, places = torch.unique(wanted, return_inverse=True)
        others = torch.randint(vocab, (min(NEGATIVES, vocab),), generator=generator)
        others = others[~torch.isin(others, present)]
        table = linear.table[torch.cat([present, others])]
        logits = context(x).flatten(0, 1) @ table.T - table.square().sum(-1) / 2
        # the sample stands for the vocabulary: each of the others for many
        logits[:, len(present) :] += float(
            torch.log(torch.tensor((vocab - len(present)) / max(1, len(others))))
        )
        loss = functional.cross_entropy(logits, places)
        optimizer.zero_grad()
        torch.autograd.backward([loss])
        nn.utils.clip_grad_norm_(context.parameters(), 1.0)
        optimizer.step()
    return context.eval()


def nearest_embedding(embedding: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """Similarity (T, V) of hidden states (T, D) with input embeddings by cosine: no training at all."""
    unit = functional.normalize(embedding, dim=-1)
    return functional.normalize(sequence.float(), dim=-1) @ unit.T


def read(logits: Sequence[torch.Tensor]) -> list[list[int]]:
    """The likeliest token of each place of each sequence."""
    return [one.argmax(-1).tolist() for one in logits]
