"""A run as a curve: its held-out loss against rounds, simulated seconds and bytes.

    events --course--> [Point(0), Point(1), ...] --first_below--> the point at which a target is reached

A point is an evaluation, so a target counts as reached only where it was seen to be.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from splitft.tracking.events import Evaluated, Event, RoundDone, RoundTimed, StepDone, Traffic


@dataclass(frozen=True)
class Point:
    """What a run had cost, and how good it was, after some rounds."""

    round: int
    """Rounds done."""
    loss: float
    """Held-out loss of all clients, in nats per labelled token."""
    simulated_s: float | None
    """Seconds on the simulated clock until then; None without one."""
    mb: float
    """MB (10^6 bytes) that training had sent until then, both directions, all clients."""


def loss_history(events: Iterable[Event]) -> list[Point]:
    """The points of settled events, in order of rounds; a loss that is not finite is left out."""
    sent: defaultdict[int, int] = defaultdict(int)
    seconds: dict[int, float] = {}
    losses: dict[int, float] = {}
    for event in events:
        match event:
            case StepDone():
                sent[event.round] += _bytes(event.traffic)
            case RoundDone():
                sent[event.round] += sum(map(_bytes, event.traffic.values()))
            case RoundTimed():
                seconds[event.round] = event.seconds
            case Evaluated() if math.isfinite(event.loss):
                losses[event.round] = event.loss
            case _:
                pass
    return [
        Point(
            number,
            loss,
            sum(spent for done, spent in seconds.items() if done <= number) if seconds else None,
            sum(count for done, count in sent.items() if done <= number) / 1e6,
        )
        for number, loss in sorted(losses.items())
    ]


def first_below(points: Sequence[Point], target: float) -> Point | None:
    """The first point whose loss is the target or less."""
    return next((point for point in points if point.loss <= target), None)


def _bytes(traffic: Traffic) -> int:
    return sum(traffic.up.values()) + sum(traffic.down.values())
