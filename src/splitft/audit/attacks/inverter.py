"""Train inverters on public text that read tokens off hidden states.

    public tokens --public model--> hidden at the cut (N, D) --fit--> inverter --> private hidden -> tokens

`Linear` is a ridge regression of a token's input embedding e on its hidden state h that accounts for noise of
known size. It then returns the likeliest token under a normal error of the regression's own covariance,

    log p(v | h) = -1/2 (e_v - W h)' S^-1 (e_v - W h) + const

It predicts embeddings and not classes, so it also reads tokens that the public text does not contain.

`Context` is a small transformer over the whole sequence that corrects the linear prediction, trained by
cross-entropy over a sample of the vocabulary on noisy hidden states. Both follow the first stage of BiSR
(2024, arXiv 2409.00960), a learned inversion trained on public data; the linear one in closed form.

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
"""Tokens sampled as negatives in a step of training."""


@dataclass(frozen=True)
class Linear:
    """The linear inverter, in an embedding space where its error is white."""

    mean: torch.Tensor
    """(D,) of hidden states."""
    scale: torch.Tensor
    """(D,) standard deviation of hidden states."""
    weight: torch.Tensor
    """(D, D): standardised hidden state -> embedding."""
    bias: torch.Tensor
    """(D,)."""
    whitener: torch.Tensor
    """(D, D): S^-1/2, embedding -> white."""
    table: torch.Tensor
    """(V, D): embeddings, white."""

    def predict(self, hidden: torch.Tensor) -> torch.Tensor:
        """Predict white embeddings (N, D) of hidden states (N, D)."""
        return (self.bias + ((hidden - self.mean) / self.scale) @ self.weight) @ self.whitener

    def scores(self, white: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities of tokens (N, V) of white embeddings (N, D)."""
        return torch.log_softmax(white @ self.table.T - self.table.square().sum(-1) / 2, -1)

    def logits(self, sequence: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities (T, V) of the hidden states of one sequence (T, D)."""
        return self.scores(self.predict(sequence))


def fit_linear(
    hidden: torch.Tensor, tokens: torch.Tensor, embedding: torch.Tensor, deviation: float = 0.0
) -> Linear:
    """Fit on public pairs (N, D), (N,), for observed rows that have noise of this deviation."""
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
        # the convolution sees the order of tokens, which attention alone does not
        self.enter = nn.Conv1d(2 * size, width, kernel_size=5, padding=2)
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 64), 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.mixer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.leave = nn.Linear(width, size)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, hidden: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """Predict white embeddings (B, T, D) of hidden states (B, T, D)."""
        guess = self.linear.predict(hidden)
        standard = (hidden - self.linear.mean) / self.linear.scale
        typical = guess.square().mean().sqrt().detach() + 1e-6
        x = self.enter(torch.cat([standard, guess / typical], -1).mT).mT
        correction: torch.Tensor = self.leave(self.mixer(x, src_key_padding_mask=padding))
        return guess + typical * correction

    @torch.no_grad()
    def logits(self, sequence: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities (T, V) of the hidden states of one sequence (T, D)."""
        return self.linear.scores(self(sequence[None])[0])


@dataclass(frozen=True)
class InverterTraining:
    """Hyperparameters of the transformer."""

    steps: int = 150
    lr: float = 1e-3
    batch: int = 8
    """Sequences in a step."""
    width: int = 256


def fit_context(
    linear: Linear,
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    generator: torch.Generator,
    deviation: float = 0.0,
    training: InverterTraining = InverterTraining(),
) -> Context:
    """Train on public sequences (B, T, D), (B, T) of one length, with fresh noise in each step."""
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        context = Context(linear, training.width)
    optimizer = torch.optim.AdamW(context.parameters(), lr=training.lr, weight_decay=0.01)
    vocab = len(linear.table)
    for step in range(training.steps):
        # linear warm-up over 20 steps, linear decay
        for group in optimizer.param_groups:
            group["lr"] = training.lr * min(1.0, (step + 1) / 20) * (1 - step / training.steps)
        # a batch of noisy hidden states
        rows = torch.randint(len(hidden), (training.batch,), generator=generator)
        x, wanted = hidden[rows].float(), tokens[rows].flatten()
        if deviation:
            x = x + deviation * torch.randn(x.shape, generator=generator)
        # cross-entropy over the tokens of the batch and a sample of the others
        present, places = torch.unique(wanted, return_inverse=True)
        others = torch.randint(vocab, (min(NEGATIVES, vocab),), generator=generator)
        others = others[~torch.isin(others, present)]
        table = linear.table[torch.cat([present, others])]
        logits = context(x).flatten(0, 1) @ table.T - table.square().sum(-1) / 2
        # each sampled token stands for several of the vocabulary
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
    """Return the cosine similarity (T, V) of hidden states (T, D) with input embeddings (V, D)."""
    unit = functional.normalize(embedding, dim=-1)
    return functional.normalize(sequence.float(), dim=-1) @ unit.T


def read(logits: Sequence[torch.Tensor]) -> list[list[int]]:
    """Return the likeliest token of each position of each sequence."""
    return [one.argmax(-1).tolist() for one in logits]
