"""A FLARE federation as the supervisor of a run sees it, and the run's events as they are written.

supervisor --submit_session, state, make_room--> FlareEngine --> Console --> FLARE
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitft.config import RunConfig
from splitft.deploy.flare.admin import Console, NotRunningError
from splitft.deploy.flare.job import MAKE_ROOM, STATUS, STOP
from splitft.deploy.flare.job_arguments import digest_of, sent_config, write_job
from splitft.deploy.flare.result import read_result
from splitft.deploy.supervisor import Ending
from splitft.errors import DeployError
from splitft.tracking.events import Listener, SessionEnded
from splitft.tracking.log import parse_event, read_events
from splitft.training.checkpoint import latest

GONE_S = 20.0
"""A job that FLARE calls running but has no process for so long has died with an earlier server."""
STARTING = ("SUBMITTED", "APPROVED", "DISPATCHED")
"""States of a job that has not started."""


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
    """True if `out` is a copy, to be fetched after each session."""
    restart: bool = False
    """True if the first session begins the run anew."""


class FlareEngine:
    """Runs the sessions of one run. Implements `supervisor.Engine`."""

    def __init__(self, console: Console, run: FlareRun, on_poll: Callable[[], None] = lambda: None) -> None:
        """`on_poll` is called at each look at the federation."""
        self._console, self._run, self._on_poll = console, run, on_poll
        self._digest, self._restart = digest_of(sent_config(run.config)), run.restart
        self._gone: dict[str, float] = {}  # sessions without a process, and since when
        self._refusals: dict[str, dict[str, str]] = {}  # by session, parties that did not take its job

    def connected(self) -> set[str]:
        """Return the sites that are connected now."""
        self._on_poll()
        return self._console.connected()

    def running(self, check: bool = True) -> str | None:
        """Return the session of this run that is running or about to start, whoever has submitted it.

        With `check`, raises DeployError if it has another configuration, or if the run is to begin anew.
        """
        for job in self._console.jobs():
            state, session = str(job.get("status")), str(job.get("job_id"))
            if job.get("job_name") != self._run.name or state.startswith("FINISHED"):
                continue
            status = {} if state in STARTING else self._status(session)
            if status is None:
                continue
            if check and status.get("config", self._digest) != self._digest:
                raise DeployError(
                    f"{self._run.name} is being trained with another configuration (job {session}); end that "
                    "session with --abort, or give this run another name with --out"
                )
            if check and self._restart:
                raise DeployError(
                    f"{self._run.name} is being trained (job {session}); add --abort to end that session "
                    "before the run begins anew"
                )
            return session
        return None

    def submit_session(self, rounds: int) -> str:
        """Start a session with a key of its own."""
        run, restart, self._restart = self._run, self._restart, False
        return self._console.submit(write_job(run.scratch / "job", run.name, run.config, rounds, restart))

    def state(self, session: str) -> tuple[bool, Mapping[str, Any] | None]:
        """Return whether the session has ended and, if it runs, its status if known."""
        self._on_poll()
        if not self._run.fetch and self._has_finished(session):  # do not wait for FLARE's clean-up
            return True, None
        state = self._console.state(session)
        if state.startswith("FINISHED"):
            return True, None
        if state != "RUNNING":
            return False, {}
        status = self._status(session)
        if status is not None:
            self._gone.pop(session, None)
            if session not in self._refusals:
                self._refusals[session] = self._console.refusals(session)
            return False, {**status, "refusals": self._refusals[session]}
        gone_s = time.monotonic() - self._gone.setdefault(session, time.monotonic())
        if gone_s > GONE_S:
            with contextlib.suppress(DeployError):  # FLARE may still wait for the sites' part of the job
                self._console.abort(session)
            return True, None
        return False, {}

    def make_room(self, session: str) -> None:
        """End the session after the current round."""
        self._console.ask(session, MAKE_ROOM)

    def give_up(self, session: str) -> None:
        """Abort the session."""
        self._console.abort(session)

    def stop(self, session: str) -> None:
        """Stop the session as the operator does, and wait until it has ended."""
        answer = None
        with contextlib.suppress(NotRunningError):
            answer = self._console.ask(session, STOP)
        if not (answer or {}).get("stopped"):
            self._console.abort(session)
        while not self.state(session)[0]:
            time.sleep(1.0)

    def ending(self, session: str) -> Ending:
        """Return the result of a session; one whose process was killed has none."""
        run = self._run
        if not run.fetch and self._has_finished(session):
            return Ending(latest(run.out) or 0, "finished")
        with tempfile.TemporaryDirectory() as scratch:
            result = self._console.result(session, Path(scratch))
            ending = read_result(result, run.out if run.fetch else None)
        if ending is not None:
            return ending
        rounds = 0 if run.fetch else latest(run.out) or 0
        refusals = self._console.refusals(session).items()
        refused = "".join(f"; {site} did not take the job: {reason}" for site, reason in refusals)
        return Ending(rounds, detail=f"FLARE calls it {self._console.state(session)}{refused}")

    # ----------------------------------------------------------------------------------------------

    def _status(self, session: str) -> dict[str, Any] | None:
        """Return a running job's status, nothing yet ({}), or None if it has no process."""
        try:
            return self._console.ask(session, STATUS) or {}
        except NotRunningError:
            return None

    def _has_finished(self, session: str) -> bool:
        """Return whether a session on this machine has trained the last round."""
        path = self._run.out / "events.jsonl"
        ended = (
            [event for event in read_events(path) if isinstance(event, SessionEnded)]
            if path.is_file()
            else []
        )
        return bool(ended) and ended[-1].session == session and ended[-1].reason == "finished"


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
