"""Replace labels at random: local differential privacy of a label, with the model's prediction as prior.

    last hidden (M, D) --head--> prior p (M, V), which the server can compute as well
    K     the k likeliest tokens of a position, with the k that keeps most labels: max_k q(k) sum_K p
    y'    if the label y is in K: y with probability q(k) = e^eps / (e^eps + k - 1), else another of K,
          uniformly; if y is not in K: any of K, uniformly

The loss is of y' instead of y, so the returning gradient reveals y' and no more. Any two labels give the same
y' with probabilities that differ by at most the factor e^eps: pure local DP of ONE LABEL in ONE PASS over it,
for every K that does not depend on y; passes add up. RRWithPrior: Ghazi et al. 2021, arXiv 2102.06062.

A token that the model does not expect (a name, a number) is not in K at a small eps, so it is never revealed
and never learnt. In causal language modelling a label is also the next position's token: while hidden states
can be read, this hides only the last token of a text. It has to be combined with noise on hidden states.
"""

from __future__ import annotations

import math

import torch

MAX_CANDIDATES = 1024
"""Largest k that is considered."""


def randomize_labels(
    logits: torch.Tensor, labels: torch.Tensor, epsilon: float, generator: torch.Generator
) -> torch.Tensor:
    """Return labels (M,) to compute the loss with, given the model's logits (M, V) for them."""
    prior = torch.softmax(logits.float().cpu(), -1)
    best = prior.topk(min(MAX_CANDIDATES, prior.shape[-1]), dim=-1)  # ordered
    kept = best.values.cumsum(-1) * keep_probability(epsilon, torch.arange(1, best.values.shape[-1] + 1))
    size = kept.argmax(-1, keepdim=True) + 1  # (M, 1): k
    place = (best.indices == labels.cpu()[:, None]).float()
    inside = (place * (torch.arange(place.shape[-1]) < size)).sum(-1) > 0
    own = place.argmax(-1)
    drawn = torch.rand((2, len(labels)), generator=generator)
    keep = inside & (drawn[0] < keep_probability(epsilon, size[:, 0]))
    # one of the k - 1 others where the label is in K (indices from the label on move up by 1), else any of k
    choices = torch.where(inside, size[:, 0] - 1, size[:, 0]).clamp_min(1)
    other = torch.minimum((drawn[1] * choices).long(), choices - 1)
    other = torch.where(inside & (other >= own), other + 1, other)
    answers = best.indices.gather(-1, torch.where(keep, own, other)[:, None])[:, 0]
    return answers.to(labels.device)


def keep_probability(epsilon: float, size: torch.Tensor) -> torch.Tensor:
    """Return q(k), the probability that a label in K is kept."""
    return 1 / (1 + (size.double() - 1) * math.exp(-epsilon))


def likeliest_labels(logits: torch.Tensor, answers: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return the likeliest true labels (M,) given the answers y' (M,): the attacker's side, by Bayes' rule.

    In K, p_v is multiplied by e^eps for v = y' and by 1 for all others, of which the likeliest is the model's
    own prediction. Tokens outside K are less likely than y' itself.
    """
    prior = torch.log_softmax(logits.float(), -1)
    guess = prior.max(-1)
    own = prior.gather(-1, answers[:, None])[:, 0] + epsilon
    return torch.where(own >= guess.values, answers, guess.indices)
