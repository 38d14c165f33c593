"""Keep the summary of a run folder while the run trains.

event --SummaryWriter--> SummaryFold --write(), after each round--> FOLDER/summary.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from splitft.files import write_whole
from splitft.tracking.events import Event, RunResumed
from splitft.tracking.log import read_events, settled
from splitft.tracking.summary_fold import SummaryFold
from splitft.tracking.summary_text import json_text


class SummaryWriter:
    """A listener that keeps the summary of a run folder; it comes after the folder's EventLog."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fold: SummaryFold | None = None

    def __call__(self, event: Event) -> None:
        """Fold an event that is in the folder's events; the first one with all that came before it."""
        if self._fold is None or isinstance(event, RunResumed):
            self._fold = _fold_of(self._folder)
        else:
            self._fold.add(event)

    def write(self) -> dict[str, Any]:
        """Write `summary.json` and return the summary."""
        if self._fold is None:
            self._fold = _fold_of(self._folder)
        return put_summary(self._fold.summary(), self._folder)


def put_summary(summary: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write a summary into a run folder, and return it: one line for each value and client."""
    write_whole(folder / "summary.json", json_text(summary) + "\n")
    return summary


def _fold_of(folder: Path) -> SummaryFold:
    return SummaryFold(settled(read_events(folder / "events.jsonl")))
