"""Compare the losses that clients report themselves: all have evaluated the same adapters.

    level_i  = loss_i                        how far from the median of all clients
    change_i = loss_i - its last loss        how far from the median change

A client with text of another kind has another level, round after round, and is left alone. An outlier differs
from the others in both, by more than `MOST_DEVIATIONS` robust standard deviations (1.4826 MAD; Iglewicz and
Hoaglin 1993) and by a share of the median loss; or in level alone, by a factor that no text explains. Its
loss is shown, marked, and not part of the run's loss; the controller goes on with its last one that fitted.

    round_failure: reason, if the loss of most clients has exploded in a round

A lie of a few tenths of a nat fits the others' and is not found. Nothing is compared where losses have noise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping

from splitft.protocol import Evaluation
from splitft.tracking.events import Evaluated, Traffic

MOST_DEVIATIONS = 3.5
"""Robust standard deviations."""
LEAST_SHARE = 0.5
"""Differences below this share of the median loss are ordinary, however alike the others are."""
MOST_RATIO = 4.0
"""A loss this many times above or below the median fits no text, whatever the client reported before."""
LEAST_NATS = 1.0
"""Differences below this are ordinary, whatever their ratio."""
EXPLODED_RATIO, EXPLODED_NATS = 2.0, 2.0
"""A loss above ratio * (loss before) + nats has exploded."""


def reported_losses(results: Mapping[str, Evaluation]) -> dict[str, float]:
    """Return the mean held-out loss of each client, as it reports it."""
    return {name: result.loss / max(1, result.tokens) for name, result in results.items()}


def evaluated(
    round: int,
    results: Mapping[str, Evaluation],
    outliers: Mapping[str, str],
    traffic: Mapping[str, Traffic],
) -> Evaluated:
    """Return the event of an evaluation: loss and token accuracy of each client, and of all that fit.

    The accuracy of all is that of their tokens together; None if a client does not report it.
    """
    fitting = [result for name, result in results.items() if name not in outliers]
    tokens = max(1, sum(result.tokens for result in fitting))
    correct = [result.correct for result in fitting if result.correct is not None]
    return Evaluated(
        round=round,
        loss=sum(result.loss for result in fitting) / tokens,
        by_client=reported_losses(results),
        accuracy=sum(correct) / tokens if correct and len(correct) == len(fitting) else None,
        accuracy_by_client={
            name: one.correct / max(1, one.tokens) for name, one in results.items() if one.correct is not None
        },
        outliers=outliers,
        traffic=traffic,
    )


def loss_outliers(losses: Mapping[str, float], before: Mapping[str, float]) -> dict[str, str]:
    """Return the clients whose loss does not fit the others', and why; none if fewer than three report."""
    finite = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
    if len(losses) < 3 or 2 * len(finite) <= len(losses):
        return {}
    middle = statistics.median(finite.values())
    least = max(LEAST_NATS, LEAST_SHARE * middle)
    changes = {name: loss - before[name] for name, loss in finite.items() if _known(name, before)}
    far, jumped = _far(finite, least), _far(changes, least / 2)
    found = {}
    for name, loss in losses.items():
        if name not in finite:
            found[name] = "it is not a finite number"
        elif abs(loss - middle) > LEAST_NATS and not middle / MOST_RATIO <= loss <= middle * MOST_RATIO:
            found[name] = f"the median of all is {middle:.3f}"
        elif name in far and name in jumped:
            found[name] = f"the median of all is {middle:.3f}, and its own last loss was {before[name]:.3f}"
    return found


def round_failure(losses: Mapping[str, float], before: Mapping[str, float]) -> str:
    """Describe the losses that exploded in a round, if those of most clients did; else return ""."""
    compared = [name for name in losses if _known(name, before)]
    exploded = [name for name in compared if not losses[name] <= _most_after(before[name])]
    if 2 * len(exploded) <= len(compared):
        return ""
    name = exploded[0]
    return (
        f"the held-out loss rose beyond use on {len(exploded)} of {len(compared)} clients "
        f"({name}: {before[name]:.3f} before, {losses[name]:.4g} after)"
    )


def _most_after(before: float) -> float:
    return EXPLODED_RATIO * max(before, 0.0) + EXPLODED_NATS


def _known(name: str, before: Mapping[str, float]) -> bool:
    return math.isfinite(before.get(name, math.nan))


def _far(numbers: Mapping[str, float], least: float) -> set[str]:
    """Return the names of numbers far from the median of all: in robust deviations, and by `least`."""
    if len(numbers) < 3:
        return set()
    middle = statistics.median(numbers.values())
    deviation = 1.4826 * statistics.median(_distances(numbers.values(), middle))
    return {
        name for name, one in numbers.items() if abs(one - middle) > max(MOST_DEVIATIONS * deviation, least)
    }


def _distances(numbers: Iterable[float], middle: float) -> list[float]:
    return [abs(one - middle) for one in numbers]
