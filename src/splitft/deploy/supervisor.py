"""Supervise a run over a federation: start one session after the other until all rounds are trained.

    enough sites connected --submit--> session --+--> finished, or stopped by the operator
           ^                                     |
           +-- a site can join, or it failed ----+

A session ends after the current round when an absent site has connected. It also ends when too few sites are
left, when its job dies, or with the server. The next session goes on after the last finished round. The
supervisor keeps no state of its own and can be restarted at any time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from splitft.errors import DeployError

T = TypeVar("T")
OnStatus = Callable[[str, Mapping[str, Any]], None]
"""Called with the session's id and its status, every `POLL_S`."""
POLL_S = 1.0
UNANSWERED_S = 60.0
"""A session is given up after its status was unavailable for this long."""
MAX_FRUITLESS = 5
"""Consecutive sessions without a finished round after which the run is given up."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ending:
    """Result of a session."""

    rounds: int
    """Finished rounds of the run."""
    finished: bool = False
    """Whether these are all rounds."""
    stopped: bool = False
    """Whether the operator has stopped the run."""


class Engine(Protocol):
    """A running federation. Every method raises DeployError while its server is away."""

    def connected(self) -> set[str]:
        """Return the sites that are connected now."""

    def submit_session(self) -> str:
        """Start a session; returns its id."""

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

    Raises DeployError if session after session ends without a finished round.
    """
    sessions, fruitless, rounds = 0, 0, -1
    while True:
        present = _await_sites(engine, sites, min_clients, join_s, say)
        session = _retry(engine.submit_session, "submit the next session")
        sessions += 1
        say(f"session {sessions}: {', '.join(sorted(present))}")
        _follow(engine, session, say, on_status)
        ending = _retry(partial(engine.ending, session), "read the session's result")
        if ending.finished or ending.stopped:
            return ending
        fruitless = fruitless + 1 if ending.rounds <= rounds else 0
        rounds = max(rounds, ending.rounds)
        say(f"session {sessions} ended after round {ending.rounds}")
        if fruitless >= MAX_FRUITLESS:
            raise DeployError(
                f"{MAX_FRUITLESS} sessions in a row ended without a finished round; see the logs of the "
                "server and the sites, correct the cause, and start the run again: it goes on after round "
                f"{ending.rounds}"
            )


def _await_sites(
    engine: Engine, sites: tuple[str, ...], min_clients: int, join_s: float, say: Callable[[str], None]
) -> set[str]:
    """Wait for all sites for `join_s`, then for `min_clients`; returns those that are connected."""
    deadline, announced = time.monotonic() + join_s, False
    while True:
        try:
            present = engine.connected() & set(sites)
        except DeployError as error:
            logger.info("%s", error)
            present = set()
        enough, late = len(present) >= max(1, min_clients), time.monotonic() > deadline
        if len(present) == len(sites) or (enough and late):
            return present
        if late and not announced:
            announced = True
            say(f"paused: {len(present)} of {len(sites)} sites are connected, {min_clients} are needed")
        time.sleep(POLL_S)


def _follow(engine: Engine, session: str, say: Callable[[str], None], on_status: OnStatus | None) -> None:
    """Poll a session until it has ended, and let absent sites join."""
    answered, room_made = time.monotonic(), False
    while True:
        time.sleep(POLL_S)
        try:
            ended, status = engine.state(session)
            if ended:
                return
            if status:
                answered = time.monotonic()
                if on_status is not None:
                    on_status(session, status)
                joining = _can_join(status) & engine.connected() if not room_made else set()
                if joining:
                    room_made = True
                    say(f"{', '.join(sorted(joining))} can join after this round")
                    engine.make_room(session)
        except DeployError as error:
            logger.info("%s", error)
        if time.monotonic() - answered > UNANSWERED_S:
            say("the session does not answer; starting the next")
            try:
                engine.give_up(session)
            except DeployError as error:
                logger.info("%s", error)
            return


def _can_join(status: Mapping[str, Any]) -> set[str]:
    """Return the sites without a live process in this session: absent from its start, or lost since."""
    if not status.get("started"):
        return set()
    return {site["name"] for site in status.get("sites", ()) if site["state"] in ("away", "lost")}


def _retry(call: Callable[[], T], purpose: str) -> T:
    """Call until the server answers."""
    while True:
        try:
            return call()
        except DeployError as error:
            logger.info("cannot %s yet: %s", purpose, error)
            time.sleep(POLL_S)
