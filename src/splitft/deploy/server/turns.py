"""Decide which steps of sites the server takes up next: those that others' steps have to go before wait.

    split.server_adapters   taken up
    per-client              at once; the sites have nothing in common
    shared                  at once, but a site that has completed its step waits for the others to do so
    shared-in-turn          one site at a time, from its first message of a step to its last
    shared-by-arrival       at once, one message after the other

The order is that of arrival. Nobody waits for long: a site that is lost, refused or stopped is not awaited
any more (`Server.leave`, `Server.rest`), and a turn passes on after `deploy.turn_s` if another site waits for
it. What the first had half done is then discarded, and its gradient is answered with `Again`: it sends the
same step once more. Each time its turn passes, its next one may last twice as long, so that a site on a slow
line gets through.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Protocol

from splitft.deploy.server.arrivals import Arrival
from splitft.deploy.server.uptime import UPTIME
from splitft.protocol import Activations, Again, HeadGradient, LocalStep
from splitft.specs import DeploySpec, ServerAdapters
from splitft.training.server import Server


class Turns(Protocol):
    """The order of steps in one round."""

    def due(self, held: list[Arrival]) -> list[Arrival]:
        """Remove from `held`, which is in order of arrival, the steps to serve together now."""


class AtOnce:
    """Steps of sites that have nothing in common: all are due."""

    def due(self, held: list[Arrival]) -> list[Arrival]:
        """Remove and return all."""
        found = list(held)
        held.clear()
        return found


class InCommon:
    """Steps that all sites take together: the next one begins when the current one is complete."""

    def __init__(self, server: Server) -> None:
        self._blocks = server.blocks
        self._number, self._began = 0, UPTIME.now()  # of the current step
        self._seconds: dict[str, float] = {}  # time that each site took for it

    def due(self, held: list[Arrival]) -> list[Arrival]:
        """Remove and return all but the next steps of sites that have completed the current one."""
        self._look()
        waiting = [one for one in held if isinstance(one.message, Activations) and one.site in self._seconds]
        found = [one for one in held if one not in waiting]
        held[:] = waiting
        return found

    def slow(self, spec: DeploySpec) -> set[str]:
        """Return the sites that others have waited for longer than `deploy.slack` and `patience_s` allow."""
        self._look()
        awaited, seconds = self._blocks.common.awaited, self._seconds.values()
        if not seconds or len(seconds) < len(awaited):  # half of the sites have completed it
            return set()
        limit = max(spec.slack * statistics.median(seconds), spec.patience_s)
        return awaited if UPTIME.now() - self._began > limit else set()

    def _look(self) -> None:
        """Note who has completed the current step, and whether another one has begun."""
        common, now = self._blocks.common, UPTIME.now()
        if common.number != self._number:
            self._number, self._began, self._seconds = common.number, now, {}
        for site in common.finished:
            self._seconds.setdefault(site, now - self._began)


class InTurn:
    """Steps that sites take one after the other."""

    def __init__(self, server: Server, turn_s: float) -> None:
        """Let a turn pass on after `turn_s` if another site waits."""
        self._server, self._turn_s = server, turn_s
        self._site, self._since = "", 0.0  # whose turn it is, and since when
        self._passed: Counter[str] = Counter()  # turns that have passed on, by site
        self._again: set[str] = set()  # sites whose step was discarded, and who do not know yet

    def due(self, held: list[Arrival]) -> list[Arrival]:
        """Remove and return the next step of the site whose turn it is."""
        for one in [one for one in held if one.site in self._again]:
            self._again.discard(one.site)
            if isinstance(one.message, HeadGradient):
                held.remove(one)
                one.reply(Again(step=one.message.step))
        if not self._server.in_step(self._site):
            self._site = ""
        if self._site:
            own = [one for one in held if one.site == self._site][:1]
            if own or not held or UPTIME.now() - self._since <= self._turn_s * 2 ** self._passed[self._site]:
                for one in own:
                    held.remove(one)
                return own
            self._pass_on()
        if held:
            self._site, self._since = held[0].site, UPTIME.now()
        return [held.pop(0)] if held else []

    def _pass_on(self) -> None:
        """Discard the step of the site whose turn it is."""
        self._server.forget(self._site)
        self._passed[self._site] += 1
        self._again.add(self._site)
        self._site = ""


class ByArrival:
    """Steps that are served one message after the other: each gradient changes what the next one meets."""

    def due(self, held: list[Arrival]) -> list[Arrival]:
        """Remove and return the message that came first."""
        return [held.pop(0)] if held else []


class StepQueue:
    """Steps that have arrived and are not served yet."""

    def __init__(self, server: Server, turn_s: float) -> None:
        self._server, self._turn_s = server, turn_s
        self._held: list[Arrival] = []
        self._turns: Turns = AtOnce()

    def begin(self, training: bool) -> None:
        """Begin the steps of a round, or held-out batches, which change nothing that sites share."""
        self._turns = self._turns_of_round() if training else AtOnce()

    def add(self, arrivals: Iterable[Arrival]) -> None:
        """Add steps in the order of their arrival."""
        self._held += arrivals

    def due(self) -> list[Arrival]:
        """Remove and return the steps to serve together now; none if the others have to wait."""
        alone = [one for one in self._held if isinstance(one.message, LocalStep)]
        if alone:  # of sites that need no server
            self._held = [one for one in self._held if one not in alone]
            return alone
        return self._turns.due(self._held)

    def slow(self, spec: DeploySpec) -> set[str]:
        """Return the sites that hold up the others with a step of theirs."""
        return self._turns.slow(spec) if isinstance(self._turns, InCommon) else set()

    def withdraw(self, site: str) -> list[Arrival]:
        """Remove and return the steps of a site."""
        own = [one for one in self._held if one.site == site]
        self._held = [one for one in self._held if one.site != site]
        return own

    def _turns_of_round(self) -> Turns:
        made: dict[ServerAdapters, Callable[[], Turns]] = {
            "per-client": AtOnce,
            "shared": lambda: InCommon(self._server),
            "shared-in-turn": lambda: InTurn(self._server, self._turn_s),
            "shared-by-arrival": ByArrival,
        }
        return made[self._server.split.way]()
