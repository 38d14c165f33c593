"""Write events to a file and read them: one JSON object a line, flushed at once.

A run that is resumed appends to the same file: `RunResumed(round=r)` says that rounds r and later begin
again, and `settled` drops the superseded events. A line torn by a crash is ignored when the file is read, and
removed before the file is appended to.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from splitft.errors import RunError
from splitft.tracking.events import (
    CheckpointSaved,
    CutsChanged,
    Evaluated,
    Event,
    PrivacySpent,
    RoundDone,
    RoundTimed,
    RoundUndone,
    RunDone,
    RunResumed,
    RunStarted,
    StepDone,
    UpdatesBounded,
)

_EVENT: TypeAdapter[Event] = TypeAdapter(Event)


class EventLog:
    """A listener that appends each event to a file as one line of JSON, flushed at once."""

    def __init__(self, path: Path) -> None:
        _cut_off_torn_line(path)
        self._file = path.open("a", encoding="utf-8")

    def __call__(self, event: Event) -> None:
        """Write one event."""
        self._file.write(event.model_dump_json() + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._file.close()


def parse_event(line: str) -> Event:
    """Parse one line of the file; raise RunError if it is not an event of this version."""
    try:
        return _EVENT.validate_json(line)
    except ValidationError as error:
        raise RunError(f"not an event of this version: {line[:80]!r}") from error


def read_events(path: Path) -> list[Event]:
    """Read all events of a file, except a torn last line; raise RunError for any other bad line."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise RunError(f"{path}: cannot read events ({error.strerror}); is this a run folder?") from error
    lines.pop()  # after the last newline: empty, or torn
    events: list[Event] = []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(_EVENT.validate_json(line))
        except ValidationError as error:
            raise RunError(f"{path}:{number}: not an event of this version: {line[:80]!r}") from error
    return events


def read_started(path: Path) -> RunStarted | None:
    """Return how a run began, reading no further than that; None if it has not begun."""
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if '"RunStarted"' in line[:200] and line.endswith("\n"):
                    event = parse_event(line)
                    return event if isinstance(event, RunStarted) else None
    except FileNotFoundError:
        pass
    except OSError as error:
        raise RunError(f"{path}: cannot read events ({error.strerror})") from error
    return None


def settled(events: Iterable[Event]) -> list[Event]:
    """Return the events that count, without those that a resumed run repeated."""
    kept: list[Event] = []
    for event in events:
        if isinstance(event, RunResumed):
            kept = [old for old in kept if not _superseded(old, event.round)]
        kept.append(event)
    return kept


def _superseded(event: Event, restart: int) -> bool:
    """Return whether an event is of a round from `restart` on, which begins again."""
    if isinstance(event, RunDone):
        return True
    numbered = CutsChanged | StepDone | RoundDone | PrivacySpent | RoundTimed | Evaluated | CheckpointSaved
    numbered |= UpdatesBounded | RoundUndone
    return isinstance(event, numbered) and event.round >= restart


def _cut_off_torn_line(path: Path) -> None:
    """Shorten a file to its last complete line, if there is one."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
