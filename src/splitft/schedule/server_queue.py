"""The queue at the server: the batches that a free server processes next (`split.server_adapters`).

    per-client         the batches that wait for the same leg as the first in the queue, up to `group_tokens`
    shared             all clients that still have steps, once they all wait for the same leg: one batch
    shared-in-turn     one client, from its first leg at the server in a step to its last; then factors step
    shared-by-arrival  as per-client: nobody waits for others, and the factors step as each client's step ends

Within these rules the order is that of arrival. A common batch waits for the slowest client, and a client in
turn keeps the server while its own head and link work; both are part of these methods (SplitLoRA, arXiv
2407.00952; SplitFed v2, 2004.12088).
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from splitft.schedule.cost import Leg
from splitft.schedule.profile import ServerProfile


@dataclass(eq=False)
class SimulatedBatch:
    """One micro-batch, or an exchange of adapters, with its progress through its legs; equal by identity."""

    client: int
    """Number of its client."""
    legs: tuple[Leg, ...]
    done: int = 0
    """Number of finished legs."""
    ready_s: float = 0.0
    """Time of arrival at the place of its next leg."""

    @property
    def leg(self) -> Leg:
        """The leg that it waits for, or that is being processed."""
        return self.legs[self.done]


@dataclass
class QueueDiscipline:
    """The order of batches at one server."""

    server: ServerProfile
    holder: int | None = None
    """With shared-in-turn: the client between its first and last leg of a step."""

    def next_group(self, queue: Sequence[SimulatedBatch], stepping: Set[int]) -> list[SimulatedBatch]:
        """Return the batches of a queue, in order of arrival, to process now; empty if the server must wait.

        `stepping` are the clients that still have steps at the server.
        """
        if self.server.adapters == "shared":
            return _common_batch(queue, stepping)
        if self.server.adapters == "shared-in-turn":
            return self._in_turn(queue)
        return _group(queue, self.server.group_tokens)

    def _in_turn(self, queue: Sequence[SimulatedBatch]) -> list[SimulatedBatch]:
        found = next((batch for batch in queue if self.holder in (None, batch.client)), None)
        if found is None:
            return []
        returns = any(leg.place == "server" for leg in found.legs[found.done + 1 :])
        self.holder = found.client if returns else None
        return [found]


def _group(queue: Sequence[SimulatedBatch], group_tokens: float) -> list[SimulatedBatch]:
    """Return the first in the queue, and others that wait for the same leg while they fit together."""
    group, tokens = [queue[0]], queue[0].leg.tokens
    for batch in queue[1:]:
        if batch.leg.name == group[0].leg.name and all(batch.client != one.client for one in group):
            tokens += batch.leg.tokens
            if tokens > group_tokens:
                break
            group.append(batch)
    return group


def _common_batch(queue: Sequence[SimulatedBatch], stepping: Set[int]) -> list[SimulatedBatch]:
    """Return a batch of each client in `stepping`, all waiting for one leg; empty if any is missing."""
    for name in dict.fromkeys(batch.leg.name for batch in queue):
        first: dict[int, SimulatedBatch] = {}
        for batch in queue:
            if batch.leg.name == name:
                first.setdefault(batch.client, batch)
        if first.keys() >= stepping:
            return list(first.values())
    return []
