"""Supervise a run over a federation: start one session after the other until all rounds are trained.

    a session of the run is running ----follow---> session --+--> finished, or stopped by the operator
    enough sites connected --submit--------------^    |
           ^                                          |
           +-- a site can join, or it failed ---------+

A session ends after the current round when an absent site has connected. It also ends when too few sites are
left, when its job dies, or with the server. The next session goes on after the last finished round. The
supervisor keeps no state of its own: it can be restarted at any time, and follows the session that it finds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

from splitft.errors import AwayError, DeployError

T = TypeVar("T")
OnStatus = Callable[[str, Mapping[str, Any]], None]
"""Called with the session's id and its status, every `POLL_S`."""
Reason = Literal["finished", "back", "paused", "stopped", "failed", "unusable", "busy", "crashed"]
POLL_S = 1.0
UNANSWERED_S = 60.0
"""A session is given up if it does not answer for this long while the federation's server does."""
AWAY_S = 5.0
"""It is said that the server is away when it has not answered for this long."""
MAX_FRUITLESS = 5
"""Consecutive sessions without a finished round after which the run is given up."""
PAUSE_S = 5.0
"""Pause after a session without a finished round; it doubles each time."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ending:
    """Result of a session."""

    rounds: int
    """Finished rounds of the run."""
    reason: Reason = "crashed"
    """Those of `SessionEnded`, and `failed`: an error, which need not come again; `unusable`: an error that
    would end the next session too; `busy`: another session trains the run; `crashed`: it left no result."""
    detail: str = ""
    """The reason in words."""
    notes: tuple[tuple[int, str], ...] = ()
    """Numbered messages of the session, as in its status."""

    @property
    def finished(self) -> bool:
        """True if all rounds are trained."""
        return self.reason == "finished"

    @property
    def stopped(self) -> bool:
        """True if the operator has stopped the run."""
        return self.reason == "stopped"


class Engine(Protocol):
    """A running federation. Every method raises AwayError while its server is away."""

    def connected(self) -> set[str]:
        """Return the sites that are connected now."""

    def running(self) -> str | None:
        """Return the session of this run that is running, whoever has started it.

        Raises DeployError if it has another configuration.
        """

    def submit_session(self, rounds: int) -> str:
        """Start a session of a run with at least so many finished rounds; returns its id."""

    def state(self, session: str) -> tuple[bool, Mapping[str, Any] | None]:
        """Return whether the session has ended and, if it runs, its status if known."""

    def make_room(self, session: str) -> None:
        """End the session after the current round, so that absent sites can join the next."""

    def give_up(self, session: str) -> None:
        """Abort the session."""

    def ending(self, session: str) -> Ending:
        """Return the result of a session that has ended."""


def supervise(
    engine: Engine,
    sites: tuple[str, ...],
    min_clients: int,
    join_s: float,
    say: Callable[[str], None],
    on_status: OnStatus | None = None,
) -> Ending:
    """Run sessions until all rounds are trained or the run is stopped; returns how the last one ended.

    Raises DeployError if session after session ends without a finished round, or none can be started.
    """
    return _Supervisor(engine, say, on_status).run(sites, min_clients, join_s)


@dataclass
class _Supervisor:
    """Follows one session after the other."""

    engine: Engine
    say: Callable[[str], None]
    on_status: OnStatus | None
    rounds: int = -1
    """Finished rounds that were heard of."""
    ours: set[str] = field(default_factory=set)
    """Sessions that this supervisor has started."""

    def run(self, sites: tuple[str, ...], min_clients: int, join_s: float) -> Ending:
        sessions, fruitless, before = 0, 0, -1
        while True:
            session = self._retry(self.engine.running) or self._start(
                sites, min_clients, join_s, sessions + 1
            )
            if session not in self.ours:
                self.say("a session of this run is running: following it")
            sessions += 1
            self._follow(session)
            ending = self._ending(session)
            if ending.finished or ending.stopped:
                return ending
            # one that crashed may have finished more rounds than were heard of
            far = "" if ending.reason == "crashed" else f" after round {ending.rounds}"
            self.say(f"session {sessions} ended{far}{_why(ending)}")
            if ending.reason == "unusable":
                raise DeployError(f"the run cannot go on: {ending.detail}")
            if ending.reason == "busy" and self._retry(self.engine.running) is not None:
                continue
            fruitless = fruitless + 1 if ending.rounds <= before else 0
            before = max(before, ending.rounds)
            if fruitless >= MAX_FRUITLESS:
                raise DeployError(
                    f"{MAX_FRUITLESS} sessions in a row ended without a finished round{_why(ending)}; see "
                    "the logs of the server and the sites, correct the cause, and start the run again: it "
                    f"goes on after round {ending.rounds}"
                )
            if fruitless:
                time.sleep(PAUSE_S * 2 ** (fruitless - 1))

    def _start(self, sites: tuple[str, ...], min_clients: int, join_s: float, number: int) -> str:
        """Start a session when enough sites are connected; return it, or one that was started meanwhile."""
        present = self._await_sites(sites, min_clients, join_s)
        if (running := self._retry(self.engine.running)) is not None:
            return running
        session = self._retry(partial(self.engine.submit_session, max(self.rounds, 0)))
        self.ours.add(session)
        self.say(f"session {number}: {', '.join(sorted(present))}")
        return session

    def _await_sites(self, sites: tuple[str, ...], min_clients: int, join_s: float) -> set[str]:
        """Wait for all sites for `join_s`, then for `min_clients`; returns those that are connected."""
        deadline, announced = time.monotonic() + join_s, False
        while True:
            present = self._retry(self.engine.connected) & set(sites)
            enough, late = len(present) >= max(1, min_clients), time.monotonic() > deadline
            if len(present) == len(sites) or (enough and late):
                return present
            if late and not announced:
                announced = True
                self.say(
                    f"paused: {len(present)} of {len(sites)} sites are connected, {min_clients} are needed"
                )
            time.sleep(POLL_S)

    def _follow(self, session: str) -> None:
        """Poll a session until it has ended, and let absent sites join.

        Only the time in which the server answers and the session does not counts towards its end. Neither a
        network failure of this machine nor a pause of this process ends a session.
        """
        unanswered_s, room_made = 0.0, False
        while True:
            before = time.monotonic()
            time.sleep(POLL_S)
            ended, status = self._retry(partial(self.engine.state, session))
            if ended:
                return
            if status:
                unanswered_s = 0.0
                self.rounds = max(self.rounds, int(status.get("rounds_done") or 0))
                if self.on_status is not None:
                    self.on_status(session, status)
                joining = _can_join(status) & self._retry(self.engine.connected) if not room_made else set()
                if joining:
                    room_made = True
                    self.say(f"{', '.join(sorted(joining))} can join after this round")
                    self._try(partial(self.engine.make_room, session))
            else:
                unanswered_s += min(time.monotonic() - before, 5 * POLL_S)
            if unanswered_s > UNANSWERED_S:
                self.say("the session does not answer; starting the next")
                self._try(partial(self.engine.give_up, session))
                return

    def _ending(self, session: str) -> Ending:
        """Return a session's result; a session that left none has finished the rounds that it was seen to."""
        ending = self._retry(partial(self.engine.ending, session))
        self.rounds = max(self.rounds, ending.rounds)
        if self.on_status is not None and ending.notes:
            self.on_status(session, {"notes": ending.notes})
        return replace(ending, rounds=max(self.rounds, 0))

    def _retry(self, call: Callable[[], T]) -> T:
        """Call until the server answers, and say when it has not for a while."""
        since, announced = time.monotonic(), False
        while True:
            try:
                answer = call()
            except AwayError as error:
                logger.info("%s", error)
                if not announced and time.monotonic() - since > AWAY_S:
                    announced = True
                    self.say("the federation's server does not answer; waiting for it")
                time.sleep(POLL_S)
                continue
            if announced:
                self.say("the federation's server answers again")
            return answer

    def _try(self, call: Callable[[], None]) -> None:
        """Call once; the session may have ended meanwhile."""
        try:
            call()
        except DeployError as error:
            logger.info("%s", error)


def _why(ending: Ending) -> str:
    if ending.reason == "crashed":
        return f": its job died ({ending.detail})" if ending.detail else ": its job died"
    return f": {ending.detail}" if ending.detail else ""


def _can_join(status: Mapping[str, Any]) -> set[str]:
    """Return the sites without a live process in this session: absent from its start, or lost since."""
    if not status.get("started"):
        return set()
    return {site["name"] for site in status.get("sites", ()) if site["state"] in ("away", "lost")}
