"""The learning rate over a run: rising at first, then constant or falling.

    rate(t) = lr * (t + 1) / warmup                 t < warmup
            = lr * shape((t - warmup) / (T - warmup))    T = rounds * steps
    shape(p) = 1 | 1 - p | (1 + cos(pi p)) / 2      constant | linear | cosine

t counts the local steps of the run as rounds have them, so a client that misses rounds, and both sides of
every cut, have the same rate in the same step. Linear and cosine are those of transformers' schedules;
warm-up begins at lr / warmup instead of 0, so that the first step is not lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from splitft.specs import TrainingSpec

SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: (1.0 + math.cos(math.pi * progress)) / 2,
}
"""Share of the full rate by progress from 0 to 1."""


def share_at(spec: TrainingSpec, step: int) -> float:
    """Share of the learning rate at a step of the run, from 0."""
    if step < spec.warmup:
        return (step + 1) / spec.warmup
    rest = max(1, spec.rounds * spec.steps - spec.warmup)
    return max(0.0, SHAPES[spec.schedule](min(1.0, (step - spec.warmup) / rest)))
