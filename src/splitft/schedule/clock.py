"""One round on a simulated clock: who does what, from when to when.

    a  |forward|up|  wait  |==server==|down|head|up|==server==|down|backward| ...
    b  |forward |up|wait|==server==|down|head|up|wait|==server==|down|backward| ...
    server          |  b  |    a    |           ...

A discrete-event simulation over a heap: at each instant first everything that ends is handed on, then
every free place (a client's processor, each direction of its link, the server) starts what waits for it,
first come first served. The server works on one group at a time (`turns` says which): with factors for each
client, all that wait for the same leg as the one that has waited longest, one micro-batch each, while they
have at most `group_tokens` padded tokens together. A group takes `group_overhead_s` plus the seconds of its
members, and all of them wait for its end. Ties go to the client named first. The arithmetic has no
randomness: equal input gives equal output, bit for bit.

A client's optimizer step is a barrier: micro-batches of a step may be in flight together, up to `in_flight`,
those of the next step may not. The round ends when every client has sent its adapters.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter

from splitft.errors import ScheduleError
from splitft.schedule.cost import Leg, Place, exchange_legs, step_legs
from splitft.schedule.profile import ServerProfile
from splitft.schedule.server_queue import ServerBatch, Turns
from splitft.schedule.workload import ClientProfile, SharedCosts

SERVER = "server"
"""Name of the server among those who do things; no client may be called so."""

WAIT = "wait"
"""Name of the interval between arrival at a place and the start of its work."""


@dataclass(frozen=True)
class Interval:
    """One bar of the chart."""

    who: str
    """A client, or SERVER."""
    leg: str
    """One of `cost.LEGS`, or WAIT."""
    place: Place
    """What is occupied, or waited for."""
    start_s: float
    """From when, in seconds since the round began."""
    end_s: float
    """Until when."""
    members: tuple[str, ...] = ()
    """For the server: the clients of the group."""

    @property
    def seconds(self) -> float:
        """How long."""
        return self.end_s - self.start_s


@dataclass(frozen=True)
class ClientRound:
    """What one client goes through in a round."""

    name: str
    """Who."""
    before: tuple[Leg, ...]
    """Legs before the first step: fetching adapters."""
    step: tuple[Leg, ...]
    """Legs of one micro-batch of a step."""
    steps: int
    """Local steps."""
    after: tuple[Leg, ...]
    """Legs after the last step: sending adapters."""
    micro_batches: int = 1
    """Micro-batches of a step."""
    in_flight: int | None = None
    """How many of them are underway at once; None for all."""

    @property
    def own_s(self) -> float:
        """Its round with the server to itself and micro-batches one by one, without overhead of groups."""
        step_s = sum(leg.seconds for leg in self.step)
        once_s = sum(leg.seconds for leg in (*self.before, *self.after))
        return once_s + self.steps * self.micro_batches * step_s


@dataclass(frozen=True)
class RoundTimeline:
    """What happened in a round, and when."""

    clients: tuple[str, ...]
    """Who took part, in the order given."""
    intervals: tuple[Interval, ...]
    """By start; at a client every leg has one, on the server every group."""
    round_s: float
    """Until the last client has sent its adapters."""

    def of(self, who: str, place: Place | None = None) -> tuple[Interval, ...]:
        """The intervals of a client or of SERVER, waits included; of one place only if it is given."""
        if who not in (*self.clients, SERVER):
            raise ScheduleError(f"{who!r} took no part in the round; {', '.join(self.clients)} did")
        return tuple(one for one in self.intervals if one.who == who and place in (None, one.place))

    def finished_s(self, client: str) -> float:
        """When this client had sent its adapters."""
        return max((one.end_s for one in self.of(client)), default=0.0)

    def seconds_by_leg(self, who: str) -> dict[str, float]:
        """Seconds that a client (or SERVER) spent on each leg, waiting included as a leg of its own.

        With one micro-batch a client is always on exactly one leg, so these add up to when it finished.
        """
        seconds: dict[str, float] = {}
        for one in self.of(who):
            seconds[one.leg] = seconds.get(one.leg, 0.0) + one.seconds
        return seconds

    def busy_s(self, who: str) -> float:
        """Seconds in which a client's processor, or the server, was computing."""
        place: Place = "server" if who == SERVER else "client"
        return sum(one.seconds for one in self.of(who, place) if one.leg != WAIT)

    def idle_s(self, who: str) -> float:
        """Seconds of the round in which it was not."""
        return self.round_s - self.busy_s(who)


def client_round(costs: SharedCosts, client: ClientProfile, cut: int) -> ClientRound:
    """A client's round at this cut, with the legs that `cost` predicts."""
    before, after = exchange_legs(costs, client, cut)
    micro_batches = costs.parts(client.workload)
    divided = replace(client, workload=client.workload.divided(micro_batches))
    legs = step_legs(costs, divided, cut)
    steps, in_flight = client.workload.steps, costs.in_flight
    if cut == costs.sizes.blocks:  # it works alone, on one part after the other
        in_flight = 1
    return ClientRound(client.name, before, legs, steps, after, micro_batches, in_flight)


def simulate_round(clients: Sequence[ClientRound], server: ServerProfile) -> RoundTimeline:
    """Run one round of these clients to its end.

    Raises ScheduleError if a name appears twice, or if a client has no work or endless work.
    """
    _check(clients)
    if server.adapters == "shared" and len({client.micro_batches for client in clients}) > 1:
        raise ScheduleError("clients that share the server's factors need equal numbers of micro-batches")
    return _Clock(clients, server).run()


def simulate_in_turn(clients: Sequence[ClientRound], server: ServerProfile) -> RoundTimeline:
    """One round of clients that train one after the other: each has the server to itself, and times add up.

    Raises what `simulate_round` raises.
    """
    _check(clients)
    intervals: list[Interval] = []
    now_s = 0.0
    for client in clients:
        alone = simulate_round([client], server)
        intervals += [
            replace(one, start_s=one.start_s + now_s, end_s=one.end_s + now_s) for one in alone.intervals
        ]
        now_s += alone.round_s
    return RoundTimeline(tuple(client.name for client in clients), tuple(intervals), now_s)


_Where = tuple[int, Place]
"""A place: a client's number and what of it; the server is (-1, "server")."""


@dataclass
class _Clock:
    """The state of a running simulation."""

    clients: Sequence[ClientRound]
    server: ServerProfile
    ends: list[tuple[float, int, _Where, list[ServerBatch]]] = field(default_factory=list)
    """Heap of what is under way: end, number, place, members."""
    waiting: dict[_Where, list[ServerBatch]] = field(default_factory=dict)
    """What waits for each place, in order of arrival; places for which nothing waits are not in it."""
    busy: set[_Where] = field(default_factory=set)
    intervals: list[Interval] = field(default_factory=list)
    queued: dict[int, list[tuple[Leg, ...]]] = field(default_factory=dict)
    """Micro-batches of a client's step that begin when others are done."""
    stepping: set[int] = field(default_factory=set)
    """Clients that still have steps at the server."""
    number: int = 0
    """Of the next entry of the heap: entries of equal end come out as they went in."""

    def __post_init__(self) -> None:
        self.turns = Turns(self.server)

    def run(self) -> RoundTimeline:
        self.stepping = {i for i, one in enumerate(self.clients) if one.steps and _at_server([one.step])}
        stages = [_stages(client) for client in self.clients]
        open_batches = [0] * len(self.clients)
        for client in range(len(self.clients)):
            open_batches[client] = self.enter(next(stages[client]), client, 0.0)
        self.start(0.0)
        now_s = 0.0
        while self.ends:
            now_s = self.ends[0][0]
            for batch in sorted(self.ended(now_s), key=attrgetter("client")):
                batch.done += 1
                if batch.done < len(batch.legs):
                    self.wait(batch, now_s)
                    continue
                if queued := self.queued[batch.client]:
                    self.wait(ServerBatch(batch.client, queued.pop()), now_s)
                    continue
                open_batches[batch.client] -= 1
                if not open_batches[batch.client]:  # the barrier: on to the next step
                    stage = next(stages[batch.client], ())
                    if not _at_server(stage):
                        self.stepping.discard(batch.client)
                    open_batches[batch.client] = self.enter(stage, batch.client, now_s)
            self.start(now_s)
        ordered = sorted(self.intervals, key=lambda one: (one.start_s, one.end_s))  # stable
        return RoundTimeline(tuple(client.name for client in self.clients), tuple(ordered), now_s)

    def enter(self, chains: Sequence[tuple[Leg, ...]], client: int, now_s: float) -> int:
        """Begin as many of these chains of legs as may be underway together; return how many."""
        at_once = self.clients[client].in_flight or len(chains)
        self.queued[client] = list(chains[at_once:])
        for legs in chains[:at_once]:
            self.wait(ServerBatch(client, legs), now_s)
        return len(chains[:at_once])

    def wait(self, batch: ServerBatch, now_s: float) -> None:
        place = batch.leg.place
        where: _Where = (-1, place) if place == "server" else (batch.client, place)
        batch.ready_s = now_s
        self.waiting.setdefault(where, []).append(batch)

    def ended(self, now_s: float) -> Iterator[ServerBatch]:
        """All batches whose leg ends now; their places are free again."""
        while self.ends and self.ends[0][0] == now_s:
            _, _, where, members = heapq.heappop(self.ends)
            self.busy.discard(where)
            yield from members

    def start(self, now_s: float) -> None:
        """Let every free place begin what waits for it."""
        for where in sorted(where for where in self.waiting if where not in self.busy):
            queue = self.waiting[where]
            group = self.turns.next(queue, self.stepping) if where[1] == "server" else queue[:1]
            for batch in group:
                queue.remove(batch)
            if not queue:
                del self.waiting[where]
            if group:
                self.work(where, group, now_s)

    def work(self, where: _Where, group: list[ServerBatch], now_s: float) -> None:
        """Occupy a place with one leg of this group, and write it down."""
        seconds = sum(batch.leg.seconds for batch in group)
        if where[1] == "server":
            seconds += self.server.group_overhead_s
        end_s = now_s + seconds
        for batch in group:
            name, leg = self.clients[batch.client].name, batch.leg
            if batch.ready_s < now_s:
                self.intervals.append(Interval(name, WAIT, leg.place, batch.ready_s, now_s))
            self.intervals.append(Interval(name, leg.name, leg.place, now_s, end_s))
        if where[1] == "server":
            members = tuple(self.clients[batch.client].name for batch in group)
            self.intervals.append(Interval(SERVER, group[0].leg.name, "server", now_s, end_s, members))
        self.busy.add(where)
        heapq.heappush(self.ends, (end_s, self.number, where, group))
        self.number += 1


def _at_server(chains: Sequence[tuple[Leg, ...]]) -> bool:
    return any(leg.place == "server" for legs in chains for leg in legs)


def _stages(client: ClientRound) -> Iterator[Sequence[tuple[Leg, ...]]]:
    """What a client goes through between barriers: chains of legs that may be in flight together."""
    if client.before:
        yield (client.before,)
    for _ in range(client.steps):
        yield (client.step,) * client.micro_batches
    if client.after:
        yield (client.after,)


def _check(clients: Sequence[ClientRound]) -> None:
    """Raise ScheduleError unless these clients can be simulated."""
    names = [client.name for client in clients]
    for client in clients:
        if names.count(client.name) > 1 or client.name == SERVER:
            raise ScheduleError(f"a client may not be called {client.name!r}: the name is taken")
        in_flight = 1 if client.in_flight is None else client.in_flight
        if min(client.steps, client.micro_batches, len(client.step), in_flight) < 1:
            raise ScheduleError(
                f"client {client.name!r} has {client.steps} steps of {client.micro_batches} micro-batches of "
                f"{len(client.step)} legs, {in_flight} in flight; give at least one of each"
            )
        for leg in (*client.before, *client.step, *client.after):
            if not 0 <= leg.seconds < float("inf"):
                raise ScheduleError(
                    f"client {client.name!r}: {leg.name} takes {leg.seconds} s; it must be a finite time"
                )
