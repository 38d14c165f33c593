"""The timeline of one simulated round: intervals of clients and server, and sums over them.

who       leg                place     start_s  end_s
client-1  client_forward     client        0.0    1.2
client-1  wait               server        1.5    1.9
server    server_forward     server        1.9    2.4    members (client-1, client-2)
"""

from __future__ import annotations

from dataclasses import dataclass

from splitft.errors import ScheduleError
from splitft.schedule.cost import Place

SERVER = "server"
"""Name of the server in timelines; no client may have it."""

WAIT = "wait"
"""Leg name of the interval between arrival at a place and the start of its work."""


@dataclass(frozen=True)
class Interval:
    """One bar of the chart."""

    who: str
    """A client, or SERVER."""
    leg: str
    """One of `cost.LEGS`, or WAIT."""
    place: Place
    """The place that is occupied, or waited for."""
    start_s: float
    """Start, in seconds since the round began."""
    end_s: float
    """End, likewise."""
    members: tuple[str, ...] = ()
    """For the server: the clients of the group."""

    @property
    def seconds(self) -> float:
        """Its duration."""
        return self.end_s - self.start_s


@dataclass(frozen=True)
class RoundTimeline:
    """All intervals of a round."""

    clients: tuple[str, ...]
    """Names of the participants, in the order given."""
    intervals: tuple[Interval, ...]
    """By start: one for every leg of a client, and one for every group of the server."""
    round_s: float
    """Seconds until the last client has sent its adapters."""

    def of(self, who: str, place: Place | None = None) -> tuple[Interval, ...]:
        """Return the intervals of a client or of SERVER, waits included; with `place`, of that place only."""
        if who not in (*self.clients, SERVER):
            raise ScheduleError(f"{who!r} took no part in the round; {', '.join(self.clients)} did")
        return tuple(one for one in self.intervals if one.who == who and place in (None, one.place))

    def seconds_by_leg(self, who: str) -> dict[str, float]:
        """Return the seconds that a client (or SERVER) spent on each leg, with waiting as a leg of its own.

        With one micro-batch a client is always on exactly one leg, so these add up to when it finished.
        """
        seconds: dict[str, float] = {}
        for one in self.of(who):
            seconds[one.leg] = seconds.get(one.leg, 0.0) + one.seconds
        return seconds

    def busy_s(self, who: str) -> float:
        """Return the seconds in which a client's processor, or the server, was computing."""
        place: Place = "server" if who == SERVER else "client"
        return sum(one.seconds for one in self.of(who, place) if one.leg != WAIT)

    def idle_s(self, who: str) -> float:
        """Return the seconds of the round in which it was not."""
        return self.round_s - self.busy_s(who)
