"""Whose batches a free server works on next, as its factors demand (`split.server_adapters`).

    per-client       who waits for the same leg as the one that has waited longest, while they fit together
    shared           all clients that still have steps, once they all wait for the same leg: one common batch
    shared-in-turn   one client from its first visit in a step to its last: the factors step in between

Arrival decides among those that may come. A common batch waits for the slowest client, and a client in its
turn keeps the server while its own head and link work: what these methods take, beside groups that form
themselves (SplitLoRA, arXiv 2407.00952; SplitFed v2, 2004.12088).
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from splitft.schedule.cost import Leg
from splitft.schedule.profile import ServerProfile


@dataclass(eq=False)
class ServerBatch:
    """One micro-batch (or an exchange of adapters) on its way through its legs; equal to itself alone."""

    client: int
    legs: tuple[Leg, ...]
    done: int = 0
    ready_s: float = 0.0

    @property
    def leg(self) -> Leg:
        """What it waits for, or what is done with it."""
        return self.legs[self.done]


@dataclass
class Turns:
    """The order at one server."""

    server: ServerProfile
    holder: int | None = None
    """The client whose turn has begun and not ended."""

    def next(self, queue: Sequence[ServerBatch], stepping: Set[int]) -> list[ServerBatch]:
        """Of those that wait, in order of arrival, the ones to work on now; none if all have to wait on.

        `stepping`: the clients that still have steps at the server.
        """
        if self.server.adapters == "shared":
            return _all_of_a_leg(queue, stepping)
        if self.server.adapters == "shared-in-turn":
            return self._one(queue)
        return _group(queue, self.server.group_tokens)

    def _one(self, queue: Sequence[ServerBatch]) -> list[ServerBatch]:
        found = next((batch for batch in queue if self.holder in (None, batch.client)), None)
        if found is None:
            return []
        returns = any(leg.place == "server" for leg in found.legs[found.done + 1 :])
        self.holder = found.client if returns else None
        return [found]


def _group(queue: Sequence[ServerBatch], group_tokens: float) -> list[ServerBatch]:
    """The first in the queue, and the others that wait for the same leg while they fit together."""
    group, tokens = [queue[0]], queue[0].leg.tokens
    for batch in queue[1:]:
        if batch.leg.name == group[0].leg.name and all(batch.client != one.client for one in group):
            tokens += batch.leg.tokens
            if tokens > group_tokens:
                break
            group.append(batch)
    return group


def _all_of_a_leg(queue: Sequence[ServerBatch], stepping: Set[int]) -> list[ServerBatch]:
    """A batch of every client that still has steps, all waiting for the same leg; none if one is missing."""
    for name in dict.fromkeys(batch.leg.name for batch in queue):
        first: dict[int, ServerBatch] = {}
        for batch in queue:
            if batch.leg.name == name:
                first.setdefault(batch.client, batch)
        if first.keys() >= stepping:
            return list(first.values())
    return []
