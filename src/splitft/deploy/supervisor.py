"""The supervisor of a run: starts one link after the other until all rounds are trained.

    enough sites there --submit--> link runs --------------------------> finished
        ^                           |  a site that was away is connected: make room, after this round
        +---------------------------+  ended early, died, or the whole server did     stopped by hand: no more

What a link leaves is the last finished round, so the supervisor itself keeps nothing and may be started anew.
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
POLL_S = 1.0
UNANSWERED_S = 60.0
"""A job that is said to run and answers nothing for so long is given up."""
FRUITLESS = 5
"""Links without a finished round, one after the other, after which the run is given up."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ending:
    """What came of a link."""

    rounds: int
    """Rounds of the run that are safe."""
    finished: bool = False
    """Whether these are all."""
    stopped: bool = False
    """Whether whoever runs the federation has stopped the run."""


class Engine(Protocol):
    """A running federation, as the supervisor sees it. Raises DeployError while its server is away."""

    def connected(self) -> set[str]:
        """Sites that are connected now."""

    def submit_link(self) -> str:
        """Start a link; returns its name."""

    def state(self, link: str) -> tuple[bool, Mapping[str, Any] | None]:
        """Whether it has ended, and else what it tells of itself, if it does."""

    def make_room(self, link: str) -> None:
        """Let it end after the round underway."""

    def give_up(self, link: str) -> None:
        """Stop it."""

    def ending(self, link: str) -> Ending:
        """After its end: what came of it."""


def supervise(
    federation: Engine,
    sites: tuple[str, ...],
    min_clients: int,
    gather_s: float,
    say: Callable[[str], None],
    tell: Callable[[str, Mapping[str, Any]], None] | None = None,
) -> Ending:
    """Run links until all rounds are trained, or somebody stops the run; returns how the last one ended.

    Raises DeployError if link after link ends without a finished round.
    """
    links, fruitless, done = 0, 0, -1
    while True:
        present = _await_sites(federation, sites, min_clients, gather_s, say)
        link = _insist(federation.submit_link, "submit the next link")
        links += 1
        say(f"link {links}: {', '.join(sorted(present))}")
        _follow(federation, link, say, tell)
        ending = _insist(partial(federation.ending, link), "read what came out")
        if ending.finished or ending.stopped:
            return ending
        fruitless = fruitless + 1 if ending.rounds <= done else 0
        done = max(done, ending.rounds)
        say(f"link {links} ended after round {ending.rounds}")
        if fruitless >= FRUITLESS:
            raise DeployError(
                f"{FRUITLESS} links in a row ended without a finished round; see the logs of the server and "
                "the sites, mend what they say, and start the run again: it goes on after round "
                f"{ending.rounds}"
            )


def _await_sites(
    federation: Engine,
    sites: tuple[str, ...],
    min_clients: int,
    gather_s: float,
    say: Callable[[str], None],
) -> set[str]:
    """Wait for all sites for a while, and then for as many as the run needs."""
    until, told = time.monotonic() + gather_s, False
    while True:
        try:
            present = federation.connected() & set(sites)
        except DeployError as error:
            logger.info("%s", error)
            present = set()
        enough, late = len(present) >= max(1, min_clients), time.monotonic() > until
        if len(present) == len(sites) or (enough and late):
            return present
        if late and not told:
            told = True
            say(f"paused: {len(present)} of {len(sites)} sites are connected, {min_clients} are needed")
        time.sleep(POLL_S)


def _follow(
    federation: Engine,
    link: str,
    say: Callable[[str], None],
    tell: Callable[[str, Mapping[str, Any]], None] | None,
) -> None:
    """Until the link has ended; makes room for who can join."""
    answered, asked = time.monotonic(), False
    while True:
        time.sleep(POLL_S)
        try:
            ended, status = federation.state(link)
            if ended:
                return
            if status:
                answered = time.monotonic()
                if tell is not None:
                    tell(link, status)
                back = _can_join(status) & federation.connected() if not asked else set()
                if back:
                    asked = True
                    say(f"{', '.join(sorted(back))} can join after this round")
                    federation.make_room(link)
        except DeployError as error:
            logger.info("%s", error)
        if time.monotonic() - answered > UNANSWERED_S:
            say("the link does not answer; starting the next")
            try:
                federation.give_up(link)
            except DeployError as error:
                logger.info("%s", error)
            return


def _can_join(status: Mapping[str, Any]) -> set[str]:
    """Sites without a living process in this link: away since its start, or lost since."""
    if not status.get("started"):
        return set()
    return {site["name"] for site in status.get("sites", ()) if site["state"] in ("away", "lost")}


def _insist(do: Callable[[], T], what: str) -> T:
    """Do it as soon as the server answers."""
    while True:
        try:
            return do()
        except DeployError as error:
            logger.info("cannot %s yet: %s", what, error)
            time.sleep(POLL_S)
