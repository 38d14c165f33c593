"""A FLARE federation as the supervisor of a run sees it, and the run's events as they are written.

supervisor --submit_session, state, make_room--> FlareEngine --> Console --> FLARE
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitft.config import RunConfig
from splitft.deploy.flare.admin import Console
from splitft.deploy.flare.job import MAKE_ROOM, STATUS, write_job
from splitft.deploy.supervisor import Ending
from splitft.tracking.events import Listener, SessionEnded
from splitft.tracking.log import parse_event, read_events
from splitft.training.checkpoint import latest


@dataclass(frozen=True)
class FlareRun:
    """A run that is submitted to a federation, session by session."""

    name: str
    config: RunConfig
    scratch: Path
    """Folder for job folders."""
    out: Path
    """The run folder: the server's own if it is on this machine, or the copy of it."""
    fetch: bool
    """Whether `out` is a copy, to be fetched after each session."""


class FlareEngine:
    """Runs the sessions of one run. Implements `supervisor.Engine`."""

    def __init__(self, console: Console, run: FlareRun, on_poll: Callable[[], None] = lambda: None) -> None:
        """`on_poll` is called at each look at the federation."""
        self._console, self._run, self._on_poll = console, run, on_poll

    def connected(self) -> set[str]:
        """Return the sites that are connected now."""
        self._on_poll()
        return self._console.connected()

    def submit_session(self) -> str:
        """Start a session with a key of its own."""
        run = self._run
        return self._console.submit(write_job(run.scratch / "job", run.name, run.config))

    def state(self, session: str) -> tuple[bool, Mapping[str, Any] | None]:
        """Return whether the session has ended and, if it runs, its status if known."""
        self._on_poll()
        if not self._run.fetch and self.ending(session).finished:  # do not wait for FLARE's clean-up
            return True, None
        state = self._console.state(session)
        if state.startswith("FINISHED"):
            return True, None
        return False, self._console.ask(session, STATUS) if state == "RUNNING" else {}

    def make_room(self, session: str) -> None:
        """End the session after the current round."""
        self._console.ask(session, MAKE_ROOM)

    def give_up(self, session: str) -> None:
        """Abort the session."""
        self._console.abort(session)

    def ending(self, session: str) -> Ending:
        """Return the result of a session, from the events in its run folder."""
        out, fetch = self._run.out, self._run.fetch
        if fetch:
            self._console.fetch(session, out)
        path = out / "events.jsonl"
        if not path.is_file():
            return Ending(0)
        endings = [event for event in read_events(path) if isinstance(event, SessionEnded)]
        last = endings[-1] if endings else None
        if last is not None and last.reason == "finished":
            return Ending(last.round, finished=True)
        rounds = (0 if last is None else last.round) if fetch else latest(out) or 0
        return Ending(rounds, stopped=last is not None and last.reason == "stopped")


class Follower:
    """Passes the events of a run folder to listeners as they are written."""

    def __init__(self, path: Path, listeners: Sequence[Listener]) -> None:
        self._path, self._listeners, self._position = path, listeners, 0

    def poll(self) -> None:
        """Pass on the events that are new since the last call."""
        if not self._listeners or not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._position += len(whole)
        for line in whole.decode("utf-8", errors="replace").splitlines():
            event = parse_event(line)
            for listener in self._listeners:
                listener(event)
