"""The state of a run between two rounds, and the parties that a round talks to.

RunState --round--> RunState        Schedule: chooses cuts, keeps the simulated clock
                                    Federation: carries the messages to the clients and back
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from splitft.adapters import AdapterState
from splitft.adapters.server_optimizer import Memory
from splitft.protocol import AdapterUpload, Evaluation, GlobalAdapters, RoundReady, RoundStart
from splitft.schedule.controllers import Decision
from splitft.seeds import Draw
from splitft.tracking.events import RoundTimed, StepDone, Traffic
from splitft.training.ranks import RankPolicy

Steps = int | Mapping[str, int]
"""Local steps in a round: one number for all clients, or one each."""


class Schedule(Protocol):
    """Chooser of cuts and keeper of the simulated clock."""

    def choose(self, number: int, cuts: Mapping[str, int], losses: Mapping[str, float]) -> Decision:
        """Choose the cuts of the next round from the current ones and the last held-out losses."""

    def steps(self, number: int, participants: Sequence[str], cuts: Mapping[str, int]) -> Mapping[str, int]:
        """Return the local steps of each participant in a round (`training.steps_by: time`)."""

    def charge(
        self, number: int, participants: Sequence[str], before: Mapping[str, int], cuts: Mapping[str, int]
    ) -> RoundTimed:
        """Advance the simulated clock by one round."""


class Federation(Protocol):
    """Carrier of messages between the rounds and the clients."""

    def start(self, messages: Mapping[str, RoundStart]) -> dict[str, RoundReady]:
        """Begin a round with these clients; those that are away do not answer."""

    def train(
        self, number: int, participants: Sequence[str], steps: Steps, listener: Callable[[StepDone], None]
    ) -> dict[str, AdapterUpload]:
        """Run the local steps; return the uploads of participants whose training counts."""

    def install(self, messages: Mapping[str, GlobalAdapters], state: RunState) -> None:
        """Send the aggregated factors; `state` is the run with them, for clients that are away."""

    def undo(self, messages: Mapping[str, GlobalAdapters], state: RunState) -> None:
        """Send every client the adapters of `state` again, without anything that was folded after it."""

    def evaluate(self) -> dict[str, Evaluation]:
        """Evaluate the global adapters on every client's held-out text."""

    def traffic(self) -> dict[str, Traffic]:
        """Return bytes by client since the last call, without those of steps."""


@dataclass(frozen=True)
class RunState:
    """State of a run between two rounds, without the optimizer moments of the parties."""

    round: int
    """Rounds finished."""
    cuts: Mapping[str, int]
    """k of every client."""
    adapters: AdapterState
    """The global factors, over all L blocks."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """Held-out loss of each client with them; of an outlier, its last one that fitted."""
    folded: AdapterState = field(default_factory=AdapterState)
    """Updates that aggregation has folded into the frozen base, over all L blocks."""
    memory: Memory = field(default_factory=dict)
    """State of the server's optimizer."""
    update_sizes: tuple[float, ...] = ()
    """Medians of the clients' updates of the last rounds (`norm_bound`)."""
    undone: int = 0
    """Rounds undone since the last one that counted."""


def back_to(before: RunState, after: RunState, ranks: RankPolicy) -> RunState:
    """Return the state before a round that is undone, with the number and the cuts of the state after it."""
    adapters = before.adapters
    if not ranks.sharing.down:  # all begin each round with fresh factors, which are not sent
        sizes = {key: (one.A.shape[1], one.B.shape[0]) for key, one in adapters.items()}
        adapters = ranks.start(sizes, next(iter(adapters.values())).A.dtype, after.round)
    return replace(before, round=after.round, cuts=after.cuts, adapters=adapters, undone=before.undone + 1)


def participants_of(number: int, clients: Sequence[str], share: float, seed: int) -> list[str]:
    """Draw a share of the clients for a round, at least one, in their usual order."""
    count = max(1, round(share * len(clients)))
    generator = Draw.PARTICIPANT.generator(seed, number)
    return [clients[i] for i in np.sort(generator.choice(len(clients), count, replace=False))]
