"""Was this text trained on? Membership inference on a final adapter, by its loss.

    losses of members, losses of others --score = -loss-----------> auc       (Yeom et al. 2018, 1709.01604)
                                        --score = base - loss-----> auc       calibrated by the base model
                                                                              (Watson et al. 2022, 2111.08440)

Members are training examples, others are held-out examples of the same clients: the same distribution, so an
adapter that remembers nothing scores 0.5. Losses are means over a text's labelled tokens. What counts for a
single person is not the mean but the few that are surely found, so the true positive rate at a small false
positive rate stands beside the AUC (Carlini et al. 2022, 2112.03570).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from splitft.data.text import Example
from splitft.errors import DataError

FALSE_POSITIVE_RATE = 0.05
"""Where the true positive rate is read off: one false alarm in twenty."""

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Membership:
    """How well one score tells members from others."""

    auc: float
    """Probability that a member scores higher than another text; 0.5 is chance."""
    low: float
    """Lower end of a 95 % interval of the AUC (Hanley and McNeil 1982)."""
    high: float
    """Upper end."""
    found: float
    """True positive rate at `FALSE_POSITIVE_RATE`."""


def by_loss(members: Scores, others: Scores) -> Membership:
    """The attack that knows the adapter alone: a low loss is a member's."""
    return judged(-members, -others)


def by_gain(members: Scores, others: Scores, base_members: Scores, base_others: Scores) -> Membership:
    """The attack that also knows the base model: what got easier than it was is a member's."""
    return judged(base_members - members, base_others - others)


ATTACKS: dict[str, Callable[..., Membership]] = {"loss": by_loss, "gain over the base": by_gain}
"""Both attacks, by what they look at."""


def judged(members: Scores, others: Scores) -> Membership:
    """AUC, its interval and the true positive rate of scores that are higher for members."""
    area = auc(members, others)
    margin = 1.96 * _standard_error(area, len(members), len(others))
    threshold = np.quantile(others, 1 - FALSE_POSITIVE_RATE, method="higher")
    return Membership(
        area, max(0.0, area - margin), min(1.0, area + margin), float(np.mean(members > threshold))
    )


def auc(members: Scores, others: Scores) -> float:
    """Share of pairs in which the member scores higher; ties count half (Mann and Whitney 1947)."""
    if not len(members) or not len(others):
        raise DataError(f"membership needs texts of both kinds: {len(members)} members, {len(others)} others")
    ordered = np.sort(others)
    below, up_to = np.searchsorted(ordered, members, "left"), np.searchsorted(ordered, members, "right")
    return float((below + up_to).sum() / (2 * len(members) * len(others)))


@torch.no_grad()
def losses(model: torch.nn.Module, examples: Sequence[Example], device: str = "cpu") -> Scores:
    """Mean loss of each example over its labelled tokens, under a whole causal language model."""
    found = []
    for example in examples:
        tokens = torch.tensor([example.tokens], device=device)
        logits = model(input_ids=tokens).logits[0, example.labelled_from - 1 : -1]
        wide = torch.promote_types(logits.dtype, torch.float32)
        found.append(float(functional.cross_entropy(logits.to(wide), tokens[0, example.labelled_from :])))
    return np.array(found)


def _standard_error(area: float, members: int, others: int) -> float:
    """Of an AUC, by Hanley and McNeil 1982, Radiology 143(1)."""
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (members - 1) * (q1 - area**2) + (others - 1) * (q2 - area**2)
    return math.sqrt(max(0.0, variance) / (members * others))
