"""The runs of a comparison: each a configuration, and the folder that it is trained in.

A run's folder is named after a hash of its resolved configuration and our version: a finished run is not
trained again, one that stopped continues from its last round, and another configuration has another folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from splitft.compare.budget import UNBOUNDED, Budget, history_of
from splitft.config import RunConfig, dump, load
from splitft.run.folder import is_finished
from splitft.tracking.events import Event
from splitft.version import __version__


@dataclass(frozen=True)
class ComparisonRow:
    """One run of a comparison."""

    method: str
    seed: int
    config: RunConfig
    folder: Path
    budget: Budget = UNBOUNDED
    """How far it is trained."""
    note: str = ""
    """A few words that tell it from other runs of the method and seed."""

    @property
    def name(self) -> str:
        """Its name in progress and messages."""
        return ", ".join(filter(None, (self.method, f"seed {self.seed}", self.note)))

    @property
    def finished(self) -> bool:
        """True if it is trained already, as far as it is needed."""
        if not (self.folder / "events.jsonl").is_file():
            return False
        if self.budget == UNBOUNDED:
            return is_finished(self.folder)
        return bool(points := history_of(self.folder)) and self.budget.spent(points[-1])


RowListener = Callable[[ComparisonRow, Event], None]
"""Receives the events of every run."""


def plan_row(file: Path, method: str, seed: int, runs: Path, overrides: Sequence[str]) -> ComparisonRow:
    """Return one run, with its configuration checked; write nothing. Raises ConfigError."""
    config = load(file, [*overrides, f"method={method}", f"seed={seed}"])
    return ComparisonRow(config.method, seed, config, runs / f"{method}-seed{seed}-{_digest(config)}")


def _digest(config: RunConfig) -> str:
    return hashlib.sha256(f"{__version__}\n{dump(config)}".encode()).hexdigest()[:8]
