"""The order in which clients' steps begin and complete at the server, for `shared-by-arrival` factors.

    a's forward          a's backward
       |  b's forward       |   b's backward                 server_forward, server_backward of the timeline
       v     v              v        v
    a begins, b begins, a completes, b completes             b's gradient is of factors without a's step

A step begins when the server starts on its first micro-batch, and completes when the last one's backward pass
ends. Its gradient is that of the server's factors as they were when it began; the factors step when it
completes. A group's clients begin before any of them completes, in the order in which they arrived.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, Protocol

from splitft.schedule.clock import ClientRound
from splitft.schedule.round_timeline import SERVER, RoundTimeline

FORWARD, BACKWARD = ("server_forward", "server_step"), ("server_backward", "server_step")
"""Legs at the server with a forward pass, and those with a backward pass."""


@dataclass(frozen=True)
class StepMark:
    """The beginning or the completion of a client's step at the server."""

    client: str
    event: Literal["begins", "completes"]


class ArrivalOrder(Protocol):
    """The order of steps at the server in any round, with the cuts of the clients that need the server."""

    def __call__(self, number: int, cuts: Mapping[str, int], steps: int) -> Sequence[StepMark]:
        """Return the marks of these clients' steps in round `number`, in order."""


def arrival_order(timeline: RoundTimeline, rounds: Sequence[ClientRound]) -> list[StepMark]:
    """Return the order of a simulated round."""
    parts = {one.name: one.micro_batches for one in rounds}
    passes: Counter[tuple[str, str]] = Counter()
    marks: list[StepMark] = []
    for group in timeline.of(SERVER):
        # micro-batches of a client come to each pass in order, so counting tells their places in the step
        if group.leg in FORWARD:
            for client in group.members:
                if passes[client, "forward"] % parts[client] == 0:
                    marks.append(StepMark(client, "begins"))
                passes[client, "forward"] += 1
        if group.leg in BACKWARD:
            for client in group.members:
                passes[client, "backward"] += 1
                if passes[client, "backward"] % parts[client] == 0:
                    marks.append(StepMark(client, "completes"))
    return marks


def one_at_a_time(number: int, cuts: Mapping[str, int], steps: int) -> list[StepMark]:
    """Return an order in which no two steps overlap: step by step, client by client."""
    return [
        StepMark(client, event) for _ in range(steps) for client in cuts for event in ("begins", "completes")
    ]


def waves(marks: Sequence[StepMark]) -> Iterator[tuple[Literal["begins", "completes"], list[str]]]:
    """Yield the clients whose steps begin in a row, and those whose steps complete in a row, by turns."""
    for event, group in groupby(marks, key=lambda mark: mark.event):
        yield event, [mark.client for mark in group]
