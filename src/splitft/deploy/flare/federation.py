"""A FLARE federation as the supervisor of a run sees it, and its events as they come.

chain --submit_link, state, make_room--> console --> FLARE
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from splitft.config import RunConfig
from splitft.deploy.flare.console import Console
from splitft.deploy.flare.job import MAKE_ROOM, STATUS, write_job
from splitft.errors import DeployError
from splitft.runtime.checkpoint import latest
from splitft.tracking.events import Event, LinkEnded, Listener
from splitft.tracking.log import parse_event, read_events


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
        if not self._fetch and self.rounds_done(link)[1]:  # what the engine tidies up now is of no interest
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

    def rounds_done(self, link: str) -> tuple[int, bool]:
        """Rounds that are safe, and whether these are all."""
        if self._fetch:
            self._console.fetch(link, self._out)
        path = self._out / "events.jsonl"
        if not path.is_file():
            return 0, False
        endings = [event for event in read_events(path) if isinstance(event, LinkEnded)]
        if endings and endings[-1].reason == "finished":
            return endings[-1].round, True
        return (endings[-1].round if endings else 0) if self._fetch else latest(self._out) or 0, False


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
