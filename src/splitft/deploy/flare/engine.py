"""A FLARE federation as the supervisor of a run sees it, and its events as they come.

chain --submit_link, state, make_room--> console --> FLARE
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from splitft.config import RunConfig
from splitft.deploy.flare.admin import Console
from splitft.deploy.flare.job import MAKE_ROOM, STATUS, write_job
from splitft.deploy.supervisor import Ending
from splitft.errors import DeployError
from splitft.tracking.events import Event, Listener, SessionEnded
from splitft.tracking.log import parse_event, read_events
from splitft.training.checkpoint import latest


class FlareFederation:
    """Implements `chain.Federation`."""

    def __init__(
        self,
        console: Console,
        run: str,
        config: RunConfig,
        scratch: Path,
        out: Path,
        fetch: bool,
        tend: Callable[[], None] = lambda: None,
    ) -> None:
        """`out` is the run folder: the server's own on this machine, or a copy to `fetch` after each link.

        `tend` is called between looks.
        """
        self._console, self._run, self._config = console, run, config
        self._scratch, self._out, self._fetch, self._tend = scratch, out, fetch, tend

    def connected(self) -> set[str]:
        """Sites that are connected now."""
        self._tend()
        return self._console.connected()

    def submit_link(self) -> str:
        """Start a link with a secret of its own."""
        return self._console.submit(write_job(self._scratch / "job", self._run, self._config))

    def state(self, link: str) -> tuple[bool, Mapping[str, Any] | None]:
        """Whether it has ended, and else what it tells of itself."""
        self._tend()
        if not self._fetch and self.ending(link).finished:  # what the engine tidies up now is of no interest
            return True, None
        state = self._console.state(link)
        if state.startswith("FINISHED"):
            return True, None
        return False, self._console.ask(link, STATUS) if state == "RUNNING" else {}

    def make_room(self, link: str) -> None:
        """Let it end after the round underway."""
        self._console.ask(link, MAKE_ROOM)

    def give_up(self, link: str) -> None:
        """Stop it."""
        self._console.abort(link)

    def ending(self, link: str) -> Ending:
        """What came of it."""
        if self._fetch:
            self._console.fetch(link, self._out)
        path = self._out / "events.jsonl"
        if not path.is_file():
            return Ending(0)
        endings = [event for event in read_events(path) if isinstance(event, SessionEnded)]
        last = endings[-1] if endings else None
        if last is not None and last.reason == "finished":
            return Ending(last.round, finished=True)
        rounds = (0 if last is None else last.round) if self._fetch else latest(self._out) or 0
        return Ending(rounds, stopped=last is not None and last.reason == "stopped")


class Follower:
    """Reads the events of a run folder as they are written, and tells the listeners."""

    def __init__(self, path: Path, listeners: Sequence[Listener]) -> None:
        self._path, self._listeners, self._at = path, listeners, 0

    def look(self) -> None:
        """Tell what is new since the last look."""
        if not self._listeners or not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._at)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        for line in whole.decode("utf-8", errors="replace").splitlines():
            event: Event = parse_event(line)
            for listener in self._listeners:
                listener(event)


def explain_away(party: str, log: str) -> DeployError:
    """What a user is told when a process does not come up: its last words."""
    words = [line for line in log.splitlines() if line.strip()][-3:]
    return DeployError(f"{party} did not start: {' | '.join(words) or 'it said nothing'}")
