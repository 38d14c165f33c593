"""Infer from a final adapter's loss whether a text was trained on (membership inference).

    losses of members, losses of others --score = -loss-----------> auc       (Yeom et al. 2018, 1709.01604)
                                        --score = base - loss-----> auc       calibrated by the base model
                                                                              (Watson et al. 2022, 2111.08440)

Members are training examples, others are held-out examples of the same clients: the same distribution, so an
adapter that memorises nothing scores 0.5. Losses are means over a text's labelled tokens. For a single person
the few certain finds matter more than the mean, so the true positive rate at a small false positive rate is
reported too (Carlini et al. 2022, 2112.03570).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from splitft.data.text import Example
from splitft.errors import DataError

FALSE_POSITIVE_RATE = 0.05
"""False positive rate at which the true positive rate is taken."""

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Membership:
    """Success of one score in separating members from others."""

    auc: float
    """Probability that a member scores higher than another text; 0.5 is chance."""
    low: float
    """Lower end of a 95 % interval of the AUC (Hanley and McNeil 1982)."""
    high: float
    """Upper end."""
    found: float
    """True positive rate at `FALSE_POSITIVE_RATE`."""


def by_loss(members: Scores, others: Scores) -> Membership:
    """Attack with the adapter alone: a low loss suggests a member."""
    return judged(-members, -others)


def by_gain(members: Scores, others: Scores, base_members: Scores, base_others: Scores) -> Membership:
    """Attack with the base model too: a loss that fell suggests a member."""
    return judged(base_members - members, base_others - others)


def judged(members: Scores, others: Scores) -> Membership:
    """Return AUC, its interval and the true positive rate of scores that are higher for members."""
    area = auc(members, others)
    margin = 1.96 * _standard_error(area, len(members), len(others))
    threshold = np.quantile(others, 1 - FALSE_POSITIVE_RATE, method="higher")
    return Membership(
        area, max(0.0, area - margin), min(1.0, area + margin), float(np.mean(members > threshold))
    )


def auc(members: Scores, others: Scores) -> float:
    """Return the share of pairs won by the member; ties count half (Mann and Whitney 1947)."""
    if not len(members) or not len(others):
        raise DataError(f"membership needs texts of both kinds: {len(members)} members, {len(others)} others")
    ordered = np.sort(others)
    below, up_to = np.searchsorted(ordered, members, "left"), np.searchsorted(ordered, members, "right")
    return float((below + up_to).sum() / (2 * len(members) * len(others)))


@torch.no_grad()
def losses(model: torch.nn.Module, examples: Sequence[Example], device: str = "cpu") -> Scores:
    """Return the mean loss of each example over its labelled tokens, under a whole causal language model."""
    found = []
    for example in examples:
        tokens = torch.tensor([example.tokens], device=device)
        logits = model(input_ids=tokens).logits[0, example.labelled_from - 1 : -1]
        wide = torch.promote_types(logits.dtype, torch.float32)
        found.append(float(functional.cross_entropy(logits.to(wide), tokens[0, example.labelled_from :])))
    return np.array(found)


def _standard_error(area: float, members: int, others: int) -> float:
    """Return the standard error of an AUC, by Hanley and McNeil 1982, Radiology 143(1)."""
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (members - 1) * (q1 - area**2) + (others - 1) * (q2 - area**2)
    return math.sqrt(max(0.0, variance) / (members * others))
