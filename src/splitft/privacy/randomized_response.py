"""Answer with a label at random: local differential privacy of a label, the model's own guess as prior.

    last hidden (M, D) --head--> prior p (M, V), which the server can compute as well
    K     the k likeliest tokens of a position, with the k that keeps most labels: max_k q(k) sum_K p
    y'    the label y if it is in K, with probability q(k) = e^eps / (e^eps + k - 1); else another of K, all
          alike; if y is not in K, any of K, all alike

y' takes the place of y in the loss, so the gradient that returns tells y' and no more. Any two labels give
the same y' with probabilities that differ at most by the factor e^eps: pure local DP of ONE LABEL in ONE PASS
over it, for every K that does not look at y; passes add up. RRWithPrior: Ghazi et al. 2021, 2102.06062.

What a model does not expect (a name, a number) is not in K at a small eps: never told, and never learnt.
And in causal language modelling a label is also the next position's token: as long as hidden states can be
read, this hides nothing but the last token of a text. It is the second half of a defence, never a whole one.
"""

from __future__ import annotations

import math

import torch

MOST = 1024
"""Largest K that is considered."""


def randomised(
    logits: torch.Tensor, labels: torch.Tensor, epsilon: float, generator: torch.Generator
) -> torch.Tensor:
    """Labels (M,) as they may be told, given the model's logits (M, V) for them."""
    prior = torch.softmax(logits.float().cpu(), -1)
    best = prior.topk(min(MOST, prior.shape[-1]), dim=-1)  # ordered
    kept = best.values.cumsum(-1) * kept_with(epsilon, torch.arange(1, best.values.shape[-1] + 1))
    size = kept.argmax(-1, keepdim=True) + 1  # (M, 1): k
    place = (best.indices == labels.cpu()[:, None]).float()
    inside = (place * (torch.arange(place.shape[-1]) < size)).sum(-1) > 0
    own = place.argmax(-1)
    drawn = torch.rand((2, len(labels)), generator=generator)
    truly = inside & (drawn[0] < kept_with(epsilon, size[:, 0]))
    # of k - 1 others where the label is in K (those after it move up by one), of all k where it is not
    choices = torch.where(inside, size[:, 0] - 1, size[:, 0]).clamp_min(1)
    other = torch.minimum((drawn[1] * choices).long(), choices - 1)
    other = torch.where(inside & (other >= own), other + 1, other)
    told = best.indices.gather(-1, torch.where(truly, own, other)[:, None])[:, 0]
    return told.to(labels.device)


def kept_with(epsilon: float, size: torch.Tensor) -> torch.Tensor:
    """q(k): how likely a label in K is told as it is."""
    return 1 / (1 + (size.double() - 1) * math.exp(-epsilon))


def believed(logits: torch.Tensor, told: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The likeliest true labels (M,) given what was told: the attacker's side, by Bayes' rule.

    Among K, p_v is multiplied by e^eps for v = y' and by 1 for all others, of which the likeliest is the
    model's own guess. What is outside K is less likely than y' itself.
    """
    prior = torch.log_softmax(logits.float(), -1)
    guess = prior.max(-1)
    own = prior.gather(-1, told[:, None])[:, 0] + epsilon
    return torch.where(own >= guess.values, told, guess.indices)
