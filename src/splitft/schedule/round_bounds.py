"""Bounds from below of a round's time, by sums instead of a simulation.

    own      a client's legs one after the other, or the busiest of its places if micro-batches overlap
    server   the first arrival, all of the server's work, and the shortest way home from there
    shared   clients in lockstep: in each step the slowest of every stage
    in turn  a client keeps the server from its first leg there to its last

A search skips cuts whose bound is above the best time found (`simulated_search`). Where clients seldom wait
for one another the bounds are the time itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

from splitft.schedule.clock import ClientRound
from splitft.schedule.cost import Leg
from splitft.schedule.profile import ServerProfile

ROUNDING = 1e-9
"""Relative rounding of sums, by which a bound could come out above the time that it bounds."""


def least_round_s(clients: Sequence[ClientRound], server: ServerProfile) -> float:
    """Return seconds that no round of these clients is shorter than, whoever waits for whom."""
    bounds = [_own_s(client, server) for client in clients]
    at_server = [client for client in clients if _at_server(client.step)]
    if at_server:
        bounds.append(_server_s(at_server, server))
    if at_server and server.adapters == "shared" and all(not _overlaps(one) for one in at_server):
        bounds.append(_lockstep_s(at_server, server))
    return max(bounds) * (1 - ROUNDING)


def _own_s(client: ClientRound, server: ServerProfile) -> float:
    """Return a client's round with the server to itself, or a bound of it where micro-batches overlap."""
    passes = client.steps * client.micro_batches
    if not _overlaps(client):
        return client.own_s + passes * len(_at_server(client.step)) * server.group_overhead_s
    busy: defaultdict[str, float] = defaultdict(float)
    for leg in client.step:
        busy[leg.place] += passes * leg.seconds
    return max(busy.values()) + _seconds((*client.before, *client.after))


def _server_s(clients: Sequence[ClientRound], server: ServerProfile) -> float:
    """Return the server's work, from the first arrival to the last client's way home."""
    first_s, last_s, work_s = [], [], 0.0
    for client in clients:
        where = _at_server(client.step)
        legs = client.step[where[0] : where[-1] + 1]
        held = server.adapters == "shared-in-turn"
        overhead_s = len(where) * server.group_overhead_s if held else 0.0
        # a group has its fixed time once, so of a client in a group only the rest is certain
        alone_s = (
            _seconds(legs) if held else sum(client.step[i].seconds - client.step[i].shared_s for i in where)
        )
        work_s += client.steps * client.micro_batches * (alone_s + overhead_s)
        first_s.append(_seconds(client.before) + _seconds(client.step[: where[0]]))
        last_s.append(_seconds(client.step[where[-1] + 1 :]) + _seconds(client.after))
    return min(first_s) + work_s + min(last_s)


def _lockstep_s(clients: Sequence[ClientRound], server: ServerProfile) -> float:
    """Return the time of clients that all wait for the slowest at each leg of the server."""
    steps = min(client.steps for client in clients)
    stages: list[float] = []  # between two legs at the server, the slowest of all
    for client in clients:
        where = _at_server(client.step)
        between = [_seconds(client.step[a + 1 : b]) for a, b in pairwise(where)]
        stages = [max(pair) for pair in zip(stages or between, between, strict=True)]
    at_server = zip(*([client.step[i] for i in _at_server(client.step)] for client in clients), strict=True)
    work_s: float = sum(
        _seconds(legs) - sum(leg.shared_s for leg in legs) + max(leg.shared_s for leg in legs)
        for legs in at_server
    )
    groups = len(_at_server(clients[0].step))
    again_s = max(_seconds(_around(client)) for client in clients)
    enter_s = max(
        _seconds(client.before) + _seconds(client.step[: _at_server(client.step)[0]]) for client in clients
    )
    leave_s = min(
        _seconds(client.step[_at_server(client.step)[-1] + 1 :]) + _seconds(client.after)
        for client in clients
    )
    step_s = sum(stages) + work_s + groups * server.group_overhead_s
    return enter_s + steps * step_s + (steps - 1) * again_s + leave_s


def _around(client: ClientRound) -> tuple[Leg, ...]:
    """Return the legs from the last one at the server to the first of the next step."""
    where = _at_server(client.step)
    return (*client.step[where[-1] + 1 :], *client.step[: where[0]])


def _at_server(legs: Sequence[Leg]) -> list[int]:
    return [index for index, leg in enumerate(legs) if leg.place == "server"]


def _overlaps(client: ClientRound) -> bool:
    """Return True if several micro-batches of a step may be in progress at once."""
    return client.micro_batches > 1 and client.in_flight != 1


def _seconds(legs: Iterable[Leg]) -> float:
    return sum(leg.seconds for leg in legs)
