"""Simulate one round of clients and server on a clock.

    a  |forward|up|  wait  |==server==|down|head|up|==server==|down|backward| ...
    b  |forward |up|wait|==server==|down|head|up|wait|==server==|down|backward| ...
    server          |  b  |    a    |           ...

A discrete-event simulation over a heap. At each event time all batches whose leg ends go on to their next
leg. Then every free place (a client's processor, each direction of its link, the server) starts the first
batch that waits for it. The server processes one group at a time, which `server_queue` selects. A group takes
`group_overhead_s` plus the seconds of its members, and all of them end together. Ties go to the client named
first. Nothing is random: equal input gives equal output, bit for bit.

A client's optimizer step is a barrier: up to `in_flight` micro-batches of a step are in progress together,
but none of the next step. The round ends when every client has sent its adapters.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter

from splitft.errors import ScheduleError
from splitft.schedule.cost import Leg, Place, exchange_legs, step_legs
from splitft.schedule.profile import ServerProfile
from splitft.schedule.round_timeline import SERVER, WAIT, Interval, RoundTimeline
from splitft.schedule.server_queue import QueueDiscipline, SimulatedBatch
from splitft.schedule.workload import ClientProfile, SharedCosts


@dataclass(frozen=True)
class ClientRound:
    """The work of one client in a round."""

    name: str
    """The client's name."""
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
    """Micro-batches in progress at once; None for all."""

    @property
    def own_s(self) -> float:
        """Seconds of its round alone on the server, one micro-batch at a time, without overhead of groups."""
        step_s = sum(leg.seconds for leg in self.step)
        once_s = sum(leg.seconds for leg in (*self.before, *self.after))
        return once_s + self.steps * self.micro_batches * step_s

    def scaled(self, ratios: Mapping[str, float]) -> ClientRound:
        """Return the round with the seconds of legs multiplied by these ratios, by leg name."""
        if not ratios:
            return self
        before, step, after = (
            tuple(leg.scaled(ratios.get(leg.name, 1.0)) for leg in legs)
            for legs in (self.before, self.step, self.after)
        )
        return replace(self, before=before, step=step, after=after)


def client_round(costs: SharedCosts, client: ClientProfile, cut: int) -> ClientRound:
    """Return a client's round at this cut, with the legs that `cost` predicts."""
    before, after = exchange_legs(costs, client, cut)
    micro_batches = costs.parts(client.workload)
    divided = replace(client, workload=client.workload.divided(micro_batches))
    legs = step_legs(costs, divided, cut)
    steps, in_flight = client.workload.steps, costs.in_flight
    if cut == costs.sizes.blocks:  # without the server, one micro-batch after the other
        in_flight = 1
    return ClientRound(client.name, before, legs, steps, after, micro_batches, in_flight)


def simulate_round(clients: Sequence[ClientRound], server: ServerProfile) -> RoundTimeline:
    """Simulate one round of clients that train together.

    Raises ScheduleError for a repeated name, and for a client without work or with a leg that never ends.
    """
    _check(clients)
    if server.adapters == "shared" and len({client.micro_batches for client in clients}) > 1:
        raise ScheduleError("clients that share the server's factors need equal numbers of micro-batches")
    return _Clock(clients, server).run()


def simulate_in_turn(clients: Sequence[ClientRound], server: ServerProfile) -> RoundTimeline:
    """Simulate one round of clients that train one after the other, each alone on the server.

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


_PlaceKey = tuple[int, Place]
"""A client's number and one of its places; the server is (-1, "server")."""


@dataclass
class _Clock:
    """The state of a running simulation."""

    clients: Sequence[ClientRound]
    server: ServerProfile
    ends: list[tuple[float, int, _PlaceKey, list[SimulatedBatch]]] = field(default_factory=list)
    """Heap of groups in progress: end, sequence number, place, members."""
    waiting: dict[_PlaceKey, list[SimulatedBatch]] = field(default_factory=dict)
    """Batches that wait for each place, in order of arrival; no entry is empty."""
    busy: set[_PlaceKey] = field(default_factory=set)
    intervals: list[Interval] = field(default_factory=list)
    queued: dict[int, list[tuple[Leg, ...]]] = field(default_factory=dict)
    """By client: micro-batches of its step that start when others have ended."""
    stepping: set[int] = field(default_factory=set)
    """Clients that still have steps at the server."""
    number: int = 0
    """Sequence number of the next entry of the heap, so that equal ends leave it in order."""

    def __post_init__(self) -> None:
        self.discipline = QueueDiscipline(self.server)

    def run(self) -> RoundTimeline:
        """Run to the end of the round."""
        # every client enters its first stage
        self.stepping = {i for i, one in enumerate(self.clients) if one.steps and _at_server([one.step])}
        stages = [_stages(client) for client in self.clients]
        open_batches = [0] * len(self.clients)
        for client in range(len(self.clients)):
            open_batches[client] = self.enter(next(stages[client]), client, 0.0)
        self.start(0.0)
        # from event to event
        now_s = 0.0
        while self.ends:
            now_s = self.ends[0][0]
            for batch in sorted(self.ended(now_s), key=attrgetter("client")):
                batch.done += 1
                if batch.done < len(batch.legs):
                    self.wait(batch, now_s)
                    continue
                if queued := self.queued[batch.client]:
                    self.wait(SimulatedBatch(batch.client, queued.pop()), now_s)
                    continue
                open_batches[batch.client] -= 1
                if not open_batches[batch.client]:  # the barrier is reached: next stage
                    stage = next(stages[batch.client], ())
                    if not _at_server(stage):
                        self.stepping.discard(batch.client)
                    open_batches[batch.client] = self.enter(stage, batch.client, now_s)
            self.start(now_s)
        ordered = sorted(self.intervals, key=lambda one: (one.start_s, one.end_s))  # stable
        return RoundTimeline(tuple(client.name for client in self.clients), tuple(ordered), now_s)

    def enter(self, chains: Sequence[tuple[Leg, ...]], client: int, now_s: float) -> int:
        """Start as many of these chains of legs as may be in progress together, and return their number."""
        at_once = self.clients[client].in_flight or len(chains)
        self.queued[client] = list(chains[at_once:])
        for legs in chains[:at_once]:
            self.wait(SimulatedBatch(client, legs), now_s)
        return len(chains[:at_once])

    def wait(self, batch: SimulatedBatch, now_s: float) -> None:
        """Append a batch to the queue at the place of its next leg."""
        place = batch.leg.place
        where: _PlaceKey = (-1, place) if place == "server" else (batch.client, place)
        batch.ready_s = now_s
        self.waiting.setdefault(where, []).append(batch)

    def ended(self, now_s: float) -> Iterator[SimulatedBatch]:
        """Yield all batches whose leg ends now, and free their places."""
        while self.ends and self.ends[0][0] == now_s:
            _, _, where, members = heapq.heappop(self.ends)
            self.busy.discard(where)
            yield from members

    def start(self, now_s: float) -> None:
        """Start the next batches at every free place."""
        for where in sorted(where for where in self.waiting if where not in self.busy):
            queue = self.waiting[where]
            group = self.discipline.next_group(queue, self.stepping) if where[1] == "server" else queue[:1]
            for batch in group:
                queue.remove(batch)
            if not queue:
                del self.waiting[where]
            if group:
                self.work(where, group, now_s)

    def work(self, where: _PlaceKey, group: list[SimulatedBatch], now_s: float) -> None:
        """Occupy a place with one leg of this group, and record the intervals."""
        fixed_s = [batch.leg.shared_s for batch in group]
        seconds = sum(batch.leg.seconds for batch in group) - (sum(fixed_s) - max(fixed_s))
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
    """Yield a client's stages between barriers: chains of legs that may be in progress together."""
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
