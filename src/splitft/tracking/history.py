"""The held-out loss of a run against rounds, simulated seconds and bytes.

    events --loss_history--> [Point(0), Point(1), ...] --first_below--> the point at which a target is reached
                                                       --mean_loss_on_the_way--> area under the curve

A point is an evaluation, so a target is reached at the first evaluation with that loss or less.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from splitft.tracking.events import Evaluated, Event, RoundDone, RoundTimed, StepDone, Traffic


@dataclass(frozen=True)
class Point:
    """Loss and cost of a run after some rounds."""

    round: int
    """Rounds done."""
    loss: float
    """Held-out loss of all clients, in nats per labeled token."""
    simulated_s: float | None
    """Seconds on the simulated clock so far; None without a simulated clock."""
    mb: float
    """MB (10^6 bytes) sent in training so far, both directions, all clients."""
    examples: int = 0
    """Sequences trained on so far, by all clients."""
    accuracy: float | None = None
    """Share of the held-out tokens that are the most probable ones; None if it is not known."""


def loss_history(events: Iterable[Event]) -> list[Point]:
    """Return the points of settled events by round; losses that are not finite are left out."""
    sent: defaultdict[int, int] = defaultdict(int)
    trained: defaultdict[int, int] = defaultdict(int)
    seconds: dict[int, float] = {}
    losses: dict[int, float] = {}
    accuracies: dict[int, float | None] = {}
    for event in events:
        match event:
            case StepDone():
                sent[event.round] += _bytes(event.traffic)
                trained[event.round] += event.examples
            case RoundDone():
                sent[event.round] += sum(map(_bytes, event.traffic.values()))
            case RoundTimed():
                seconds[event.round] = event.seconds
            case Evaluated() if math.isfinite(event.loss):
                losses[event.round] = event.loss
                accuracies[event.round] = event.accuracy
            case _:
                pass
    return [
        Point(
            number,
            loss,
            sum(spent for done, spent in seconds.items() if done <= number) if seconds else None,
            sum(count for done, count in sent.items() if done <= number) / 1e6,
            sum(count for done, count in trained.items() if done <= number),
            accuracies[number],
        )
        for number, loss in sorted(losses.items())
    ]


def first_below(points: Sequence[Point], target: float) -> Point | None:
    """Return the first point whose loss is the target or less; None without one."""
    return next((point for point in points if point.loss <= target), None)


def mean_loss_on_the_way(points: Sequence[Point], cost: Callable[[Point], float | None], end: float) -> float:
    """Return the area under the loss against a cost from 0 to `end`, divided by `end`: nats per token.

    Between evaluations the loss is a straight line; after the last it stays. NaN where a cost is unknown.
    """
    known = [(spent, point.loss) for point in points if (spent := cost(point)) is not None]
    if not known or len(known) < len(points) or end <= 0:
        return math.nan
    costs, losses = zip(*known, strict=True)
    inside = [(x, y) for x, y in known if x < end]
    inside.append((end, float(np.interp(end, costs, losses))))
    return sum((b - a) * (f + g) / 2 for (a, f), (b, g) in pairwise(inside)) / end


def _bytes(traffic: Traffic) -> int:
    return sum(traffic.up.values()) + sum(traffic.down.values())
