"""A run folder as a report reads it.

events.jsonl, config.yaml, eval.json --read_run--> RunRecord
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitft.errors import RunError
from splitft.tracking.evaluations import read_evaluations
from splitft.tracking.events import Event, RunStarted
from splitft.tracking.log import read_events, settled
from splitft.tracking.summary import summarise


@dataclass(frozen=True)
class RunRecord:
    """The contents of a run folder."""

    name: str
    """Name of the run on the page: the folder's name, or its path where two are equal."""
    started: RunStarted
    events: list[Event]
    """Settled: without those that a resumed run superseded."""
    summary: Mapping[str, Any]
    """The summary of the events."""
    config: str
    """Text of `config.yaml`; empty without one."""
    evaluations: Sequence[Mapping[str, Any]] = ()
    """Entries of `eval.json`."""


def read_run(folder: Path, name: str | None = None) -> RunRecord:
    """Read one run folder; raise RunError if it holds no run, or one whose training never began."""
    path = folder / "events.jsonl"
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise RunError(f"{folder} {found}; give a run folder, as written by `splitft train`")
    if not path.is_file():
        raise RunError(f"{folder} has no events.jsonl; give a run folder, as written by `splitft train`")
    events = settled(read_events(path))
    started = next((event for event in events if isinstance(event, RunStarted)), None)
    if started is None:
        raise RunError(f"{folder}: the run stopped before its training began, so there is nothing to report")
    config = folder / "config.yaml"
    written = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    name = name or folder.resolve().name
    return RunRecord(name, started, events, summarise(events), written, read_evaluations(folder))
