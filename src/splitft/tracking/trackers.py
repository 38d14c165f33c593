"""Trackers: whatever is told a run's events while it trains, beside the run folder's own log.

    trackers: [csv, {name: mine, uri: ...}]  --open_trackers--> listeners of events

A tracker is made with the run folder, the configuration as plain data, and its options. It is called with
each event and closed at the end. One that fails is left out for the rest of the run, with a warning: a run
never depends on who watches it.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from splitft.errors import ConfigError
from splitft.specs.extensions import TRACKERS, TrackerSpec
from splitft.tracking.events import CutsChanged, Evaluated, Event, Listener, RoundDone

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Receives a run's events."""

    def __call__(self, event: Event) -> None:
        """Take note of one event."""

    def close(self) -> None:
        """Write what is left; the run has ended or was stopped."""


class CsvTracker:
    """Write a line for each round and client to `metrics.csv`: cut, held-out loss, bytes, token accuracy."""

    HEADINGS = ("round", "client", "cut", "loss", "bytes_up", "bytes_down", "accuracy")

    def __init__(self, folder: Path, config: Mapping[str, Any], file: str = "metrics.csv") -> None:
        """Open the file for appending. Raises ConfigError for a file that is not in the run folder."""
        if Path(file).name != file:
            raise ConfigError(f"trackers: csv: file is {file!r}; give a name without folders")
        path = folder / file
        new = not path.exists()
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        self._columns = len(self.HEADINGS)
        if new:
            self._writer.writerow(self.HEADINGS)
        else:  # an earlier version may have begun the file, with fewer columns
            with path.open(newline="", encoding="utf-8") as file_there:
                self._columns = len(next(csv.reader(file_there), self.HEADINGS))
        self._cuts: dict[str, int] = {}
        self._bytes: dict[str, tuple[int, int]] = {}

    def __call__(self, event: Event) -> None:
        """Note cuts and bytes as they come, and write a round's lines when its losses are there."""
        if isinstance(event, CutsChanged):
            self._cuts.update(event.cuts)
        elif isinstance(event, RoundDone):
            self._bytes = {
                name: (sum(traffic.up.values()), sum(traffic.down.values()))
                for name, traffic in event.traffic.items()
            }
        elif isinstance(event, Evaluated):
            for name, loss in event.by_client.items():
                up, down = self._bytes.get(name, (0, 0))
                right = event.accuracy_by_client.get(name)
                row = (event.round, name, self._cuts.get(name), loss, up, down, right)
                self._writer.writerow(row[: self._columns])
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@contextmanager
def open_trackers(
    specs: Sequence[str | TrackerSpec], folder: Path, config: Mapping[str, Any]
) -> Iterator[tuple[Listener, ...]]:
    """Make the trackers of a run; yields their listeners, and closes them at the end.

    Raises ConfigError if one cannot be made: that is said before the run begins.
    """
    opened: list[tuple[str, Tracker]] = []
    try:
        for spec in specs:
            name, options = (spec, {}) if isinstance(spec, str) else (spec.name, spec.options)
            try:
                opened.append((name, TRACKERS.find(name)(folder, config, **options)))
            except ConfigError:
                raise
            except Exception as error:  # foreign code
                raise ConfigError(
                    f"trackers: {name} cannot be set up with {options or 'no options'}: "
                    f"{type(error).__name__}: {error}"
                ) from error
        yield tuple(_guarded(name, tracker) for name, tracker in opened)
    finally:
        for name, tracker in opened:
            try:
                tracker.close()
            except Exception:  # foreign code
                logger.warning("the tracker %s could not be closed", name, exc_info=True)


def _guarded(name: str, tracker: Tracker) -> Listener:
    """Return a listener that leaves the tracker out after its first failure."""
    failed = False

    def listen(event: Event) -> None:
        nonlocal failed
        if failed:
            return
        try:
            tracker(event)
        except Exception as error:  # foreign code
            failed = True
            logger.warning("the tracker %s failed and is left out: %s", name, error)

    return listen
