"""Small federations for the laws: a tiny model, three clients with text of unequal length, real rounds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from splitft.config import from_mapping
from splitft.protocol import GlobalAdapters, Join, RoundReady, RoundStart
from splitft.run.setup import RunSetup, prepare
from splitft.schedule.controllers import Decision
from splitft.training import RunState, Simulation

WORDS = ("ward", "dose", "fever", "scan", "blood", "pulse", "nurse", "chart", "sleep", "acute", "daily")


def write_text(path: Path, examples: int = 40, seed: int = 0) -> Path:
    """A .jsonl of sentences of 2 to 7 words."""
    generator = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(examples):
            words = generator.choice(WORDS, generator.integers(2, 8))
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path


def federation(folder: Path, text: Path, cuts: Sequence[int], **sections: Mapping[str, Any]) -> RunSetup:
    """Parties over a tiny model, exact by default: equal ranks, wide types, nothing rounded on the wire."""
    base: dict[str, dict[str, Any]] = {
        "model": {"name": str(folder), "dtype": "float64"},
        "data": {"source": str(text), "max_tokens": 32},
        "clients": {"count": len(cuts), "cuts": list(cuts), "shares": {"by": "length", "alpha": 1.0}},
        "lora": {"rank": 4, "rank_at_cut": None, "alpha": 8},
        "training": {"rounds": 3, "steps": 20, "batch_size": 3, "lr": 5e-3},
        "aggregate": {"rule": "factors"},
        "wire": {"hidden": "fp64", "gradient": "fp64", "adapter": "fp64"},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return prepare(from_mapping(base))


class Scripted:
    """The run's own clock, with cuts that a test chooses."""

    def __init__(self, pace: Any, controller: Any) -> None:
        self._controller, self.charge = controller, pace.charge

    def choose(self, number: int, cuts: Mapping[str, int], losses: Mapping[str, float]) -> Decision:
        return Decision(self._controller(number, cuts), "as the test has it")


class Losing:
    """A simulation in which one client is lost as a round begins, and told where the run is before the next.

    With `moved` it was lost after it had moved to its new cut, before anyone heard of it.
    """

    def __init__(self, simulation: Simulation, lost: str, number: int, moved: bool) -> None:
        self._simulation, self._lost, self._number, self._moved = simulation, lost, number, moved
        self._everyone = simulation.clients
        self._client = simulation.clients[lost]
        self.train, self.traffic = simulation.train, simulation.traffic
        self.evaluate = simulation.evaluate

    def start(self, messages: Mapping[str, RoundStart]) -> dict[str, RoundReady]:
        number = next(iter(messages.values())).round
        if number == self._number:
            self._steps, self._moments = self._client.optimizer_state()  # as it has them on its disk
            self._personal = self._client.blocks.personal()
            if self._moved:
                self._client.start(messages[self._lost])
            others = {name: one for name, one in self._everyone.items() if name != self._lost}
            self._simulation.clients = others
        elif number == self._number + 1:
            cut = self._state.cuts[self._lost]
            ranks, private = self._client.setup.ranks, self._client.blocks.private()
            shared = self._state.adapters.within(set(range(cut)) - set(private.ranks()))
            where = Join(round=self._number, cut=cut, steps=self._steps, adapters=ranks.part_sent(shared))
            self._client.join(where, self._moments, self._personal)
            for end in self._simulation._channels[self._lost].ends.values():
                end.restart()
            self._simulation.clients = self._everyone
        return self._simulation.start(self._here(messages))

    def install(self, messages: Mapping[str, GlobalAdapters], state: RunState) -> None:
        self._state = state
        self._simulation.install(self._here(messages), state)

    def _here(self, messages: Mapping[str, Any]) -> dict[str, Any]:
        return {name: one for name, one in messages.items() if name in self._simulation.clients}


def play(
    prepared: RunSetup,
    controller: Callable[[int, Mapping[str, int]], Mapping[str, int]] = lambda number, cuts: cuts,
    tap: Any = None,
    around: Callable[[Simulation], Any] = lambda simulation: simulation,
) -> tuple[RunState, list[Any]]:
    """All rounds; returns the last state and every event. `around` wraps the federation."""
    events: list[Any] = []
    schedule = Scripted(prepared.cut_schedule, controller)
    trainer = prepared.trainer(around(prepared.simulation(tap)), events.append, schedule=schedule)
    state = trainer.train(prepared.initial())
    return state, events


def largest_relative_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Over all tensors: the largest difference against the tensor's largest number."""
    assert one.keys() == other.keys()
    return max(float((one[k] - other[k]).abs().max() / other[k].abs().max()) for k in one)
