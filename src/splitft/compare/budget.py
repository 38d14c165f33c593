"""Train a run as far as a comparison needs it, and not to its last round.

    events --BudgetListener--> stops the training after the round in which the budget is spent

A run that is stopped so has a checkpoint, and goes on from it when a later comparison needs more of it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from splitft.config import RunConfig
from splitft.errors import ConfigError, RunError
from splitft.run.folder import is_finished
from splitft.run.train import train
from splitft.tracking.events import CheckpointSaved, Evaluated, Event, Listener, RoundTimed, StepDone
from splitft.tracking.history import Point, loss_history
from splitft.tracking.log import read_events, settled


class _BudgetSpentError(Exception):
    """The run has been trained as far as it is needed."""


@dataclass(frozen=True)
class Budget:
    """The most that a run may spend; None is no bound beside the run's own rounds."""

    rounds: int | None = None
    """Rounds."""
    seconds: float | None = None
    """Seconds on the simulated clock."""
    examples: int | None = None
    """Sequences trained on, by all clients."""

    def __post_init__(self) -> None:
        for name in ("rounds", "seconds", "examples"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ConfigError(f"--until-{name} {value}: give a number above 0")

    @property
    def given(self) -> bool:
        """True if a cost other than rounds is bounded."""
        return self.seconds is not None or self.examples is not None

    def spent(self, point: Point) -> bool:
        """Return whether a run at this point has spent it."""
        return (
            (self.rounds is not None and point.round >= self.rounds)
            or (self.seconds is not None and (point.simulated_s or 0.0) >= self.seconds)
            or (self.examples is not None and point.examples >= self.examples)
        )

    def within(self, points: Sequence[Point]) -> list[Point]:
        """Return the points that a run reaches without spending more."""
        return [
            point
            for point in points
            if (self.rounds is None or point.round <= self.rounds)
            and (self.seconds is None or (point.simulated_s or 0.0) <= self.seconds)
            and (self.examples is None or point.examples <= self.examples)
        ]


UNBOUNDED = Budget()
"""A run is trained to its last round."""


class BudgetListener:
    """A listener that ends the training with the round in which a budget is spent."""

    def __init__(self, budget: Budget, before: Point) -> None:
        """Go on from the costs of the point `before`."""
        self._budget, self._now = budget, before

    def __call__(self, event: Event) -> None:
        """Add up an event; raise once a round is saved and the budget spent."""
        now = self._now
        match event:
            case StepDone():
                self._now = replace(now, examples=now.examples + event.examples)
            case RoundTimed():
                self._now = replace(now, simulated_s=(now.simulated_s or 0.0) + event.seconds)
            case CheckpointSaved():
                self._now = replace(now, round=event.round)
                if self._budget.spent(self._now):
                    raise _BudgetSpentError
            case _:
                pass


def history_of(folder: Path) -> list[Point]:
    """Return the held-out losses of the run in a folder; none if there is no run."""
    file = folder / "events.jsonl"
    return loss_history(settled(read_events(file))) if file.is_file() else []


def diverged(folder: Path) -> bool:
    """Return whether the last held-out loss of the run in a folder is not finite."""
    losses = [one.loss for one in settled(read_events(folder / "events.jsonl")) if isinstance(one, Evaluated)]
    return bool(losses) and not math.isfinite(losses[-1])


def train_within(
    config: RunConfig, folder: Path, budget: Budget, listeners: Sequence[Listener] = ()
) -> list[Point]:
    """Train, or go on with, the run in a folder until the budget is spent; return its points within it.

    A run that has spent it already is not trained. Raises RunError if the run has no simulated clock to
    count seconds with, or ends before the budget, and what `train` raises.
    """
    points = history_of(folder)
    if not points or not (budget.spent(points[-1]) or is_finished(folder)):
        resume = (folder / "config.yaml").is_file()
        for draft in () if resume else folder.glob("*.draft"):  # of a process killed before the run began
            draft.unlink()
        before = points[-1] if points else Point(0, 0.0, 0.0, 0.0)
        watch = BudgetListener(budget, before)
        with contextlib.suppress(_BudgetSpentError):
            train(config, folder, resume=resume, listeners=[*listeners, watch])
        points = history_of(folder)
    if budget.seconds is not None and points and points[-1].simulated_s is None:
        raise RunError(f"{folder} has no simulated clock; --until-seconds counts on it")
    if budget.given and points and not budget.spent(points[-1]):
        raise RunError(
            f"{folder} ends after {config.training.rounds} rounds, before the budget is spent "
            f"({_costs(points[-1])}); raise training.rounds"
        )
    inside = budget.within(points)
    if budget.given and len(inside) < 2:
        raise RunError(
            f"{folder}: its first round takes more than the budget ({_costs(points[1])}); give a larger one"
            if len(points) > 1
            else f"{folder}: no finite held-out loss after training; lower training.lr"
        )
    return inside


def _costs(point: Point) -> str:
    seconds = "" if point.simulated_s is None else f"{point.simulated_s:,.1f} simulated s, "
    return f"{seconds}{point.examples:,} examples"
