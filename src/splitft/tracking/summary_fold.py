"""Fold events into a run's summary one by one, so that a round costs what happened in it.

    event --SummaryFold.add--> totals --summary()--> summary.json        (constant time for an event)

    event --SummaryWriter--> SummaryFold --write(), after each round--> summary.json

`add` takes settled events: those that a resumed run superseded cannot be taken back. The writer therefore
folds the whole file once when a process of the run begins, and each event alone from then on.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from splitft.tracking.events import (
    ClientInfo,
    CutsChanged,
    Evaluated,
    Event,
    PrivacySpent,
    Role,
    RoundDone,
    RoundTimed,
    RoundUndone,
    RunDone,
    RunResumed,
    RunStarted,
    SiteChanged,
    StepDone,
    Traffic,
    UpdatesBounded,
    Warned,
)
from splitft.tracking.summary_text import Series

Seconds = defaultdict[str, float]


def _zero_bytes() -> dict[str, dict[str, int]]:
    return {role: {"up": 0, "down": 0} for role in get_args(Role)}


@dataclass
class _ClientTotals:
    """What one client has done so far."""

    examples: int = 0
    tokens: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    cut: Series = field(default_factory=Series)
    loss: Series = field(default_factory=Series)
    accuracy: Series = field(default_factory=Series)
    train_loss: Series = field(default_factory=Series)
    losses: dict[int, tuple[float, int]] = field(default_factory=dict)
    """Of rounds that are not done: the sum of losses times tokens, and the tokens."""

    def add_step(self, step: StepDone) -> None:
        """Count one step."""
        self.examples += step.examples
        self.tokens += step.tokens
        self.add_bytes(step.traffic)
        if step.loss is not None:
            loss, tokens = self.losses.get(step.round, (0.0, 0))
            self.losses[step.round] = (loss + step.loss * step.tokens, tokens + step.tokens)

    def add_bytes(self, traffic: Traffic) -> None:
        """Count the bytes of a step or of adapters."""
        self.bytes_up += sum(traffic.up.values())
        self.bytes_down += sum(traffic.down.values())

    def end_round(self, number: int, cut: int) -> None:
        """Add a round's cut and its token-weighted training loss: None without steps that report it."""
        loss, tokens = self.losses.pop(number, (0.0, 0))
        self.train_loss.append(_finite(loss / tokens) if tokens else None)
        self.cut.append(cut)


@dataclass
class _ClockTotals:
    """The simulated clock so far."""

    seconds: Series = field(default_factory=Series)
    move_seconds: Series = field(default_factory=Series)
    total_s: float = 0.0
    weight_bytes: int = 0
    legs: defaultdict[str, Seconds] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    idle: Seconds = field(default_factory=lambda: defaultdict(float))
    memory: Seconds = field(default_factory=lambda: defaultdict(float))

    def add(self, event: RoundTimed) -> None:
        """Add one round."""
        self.total_s += event.seconds
        self.seconds.append(event.seconds)
        self.move_seconds.append(event.move_seconds)
        self.weight_bytes += event.weight_bytes
        for client, spent_by_leg in event.legs.items():
            for leg, spent in spent_by_leg.items():
                self.legs[client][leg] += spent
        for who, spent in event.idle.items():
            self.idle[who] += spent
        for who, needed in event.memory_bytes.items():
            self.memory[who] = max(self.memory[who], needed)

    def as_data(self, machines: Mapping[str, str]) -> dict[str, Any]:
        """Return seconds by round and by client and leg, idle seconds and peak memory."""
        return {
            "seconds": self.seconds.copy(),
            "move_seconds": self.move_seconds.copy(),
            "weight_bytes": self.weight_bytes,
            "legs": {client: dict(seconds) for client, seconds in self.legs.items()},
            "idle": dict(self.idle),
            "memory_bytes": dict(self.memory),
            "machines": dict(machines),
        }


class SummaryFold:
    """The summary of the events so far; each is added in constant time."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        """Begin with these events, which are settled."""
        self._started: RunStarted | None = None
        self._finished = False
        self._clients: defaultdict[str, _ClientTotals] = defaultdict(_ClientTotals)
        self._cuts: dict[str, int] = {}
        self._changes: dict[int, Mapping[str, int]] = {}
        self._rounds = 0
        self._losses, self._errors, self._spent, self._warnings = Series(), Series(), Series(), Series()
        self._accuracies = Series()
        self._outliers: dict[str, str] = {}  # of the last evaluation
        self._steps = 0
        self._tokens = 0
        self._bytes, self._evaluation_bytes = _zero_bytes(), _zero_bytes()
        self._seconds: Seconds = defaultdict(float)
        self._clock = _ClockTotals()
        self._wall_s = 0.0
        self._since: float | None = None
        self._last = 0.0
        for event in events:
            self.add(event)

    def add(self, event: Event) -> None:
        """Fold one more event."""
        self._pass_time(event)
        match event:
            case RunStarted():
                self._started = self._started or event
            case CutsChanged():
                self._changes[event.round] = event.cuts
            case StepDone():
                self._steps += 1
                self._tokens += event.tokens
                self._clients[event.client].add_step(event)
                _add_bytes(self._bytes, event.traffic)
                for leg, seconds in event.seconds.items():
                    self._seconds[leg] += seconds
            case RoundDone():
                self._end_round(event)
                for client, traffic in event.traffic.items():
                    self._clients[client].add_bytes(traffic)
                    _add_bytes(self._bytes, traffic)
            case Evaluated():
                self._losses.append(_finite(event.loss))
                self._accuracies.append(event.accuracy)
                self._outliers = dict(event.outliers)
                for message in event.warnings:
                    self._warnings.append(message)
                for one in self._infos():
                    loss = _finite(event.by_client.get(one.name, math.nan))
                    self._clients[one.name].loss.append(loss)
                    self._clients[one.name].accuracy.append(event.accuracy_by_client.get(one.name))
                for traffic in event.traffic.values():
                    _add_bytes(self._evaluation_bytes, traffic)
            case RoundTimed():
                self._clock.add(event)
            case PrivacySpent():
                self._spent.append(_spent(event))
            case Warned() | SiteChanged() | UpdatesBounded() | RoundUndone():
                self._warnings.append(event.message)
            case RunDone():
                self._finished = True
            case _:
                pass

    def summary(self) -> dict[str, Any]:
        """Return the summary; empty without a RunStarted."""
        started = self._started
        if started is None:
            return {}
        clients = [self._client(client) for client in started.clients]
        timed = bool(self._clock.seconds)
        return {
            "version": started.version,
            "method": started.method,
            "seed": started.seed,
            "model": started.model,
            "labels": started.labels,
            "privacy": started.privacy,
            "defences": list(started.defences),
            "privacy_spent": self._spent.copy() or None,
            "finished": self._finished,
            "rounds": self._rounds,
            "eval_loss": self._losses.copy(),
            "eval_accuracy": self._accuracies.copy(),
            "loss_outliers": dict(self._outliers),
            "not_improved": [client["name"] for client in clients if not _improved(client["loss"])],
            "clients": clients,
            "bytes": {role: dict(counts) for role, counts in self._bytes.items()},
            "evaluation_bytes": {role: dict(counts) for role, counts in self._evaluation_bytes.items()},
            "aggregation_error": self._errors.copy(),
            "steps": self._steps,
            "tokens": self._tokens,
            "seconds_by_leg": {leg: round(seconds, 6) for leg, seconds in self._seconds.items()},
            "wall_seconds": self._wall_seconds(),
            "simulated_seconds": self._clock.total_s if timed else None,
            "simulated": self._clock.as_data(started.machines) if timed else None,
            "warnings": self._warnings.copy(),
        }

    def _pass_time(self, event: Event) -> None:
        """Add up the time from the first to the last event of each process of the run."""
        if self._since is None or isinstance(event, RunStarted | RunResumed):
            self._wall_s += self._last - self._since if self._since is not None else 0.0
            self._since = event.t
        self._last = event.t

    def _wall_seconds(self) -> float:
        return round(self._wall_s + self._last - self._since, 3) if self._since is not None else 0.0

    def _infos(self) -> tuple[ClientInfo, ...]:
        return self._started.clients if self._started is not None else ()

    def _end_round(self, event: RoundDone) -> None:
        self._rounds += 1
        self._cuts.update(self._changes.pop(self._rounds, {}))
        self._errors.append(_finite(event.aggregation_error))
        for client in self._infos():
            cut = self._cuts.get(client.name, client.cut)
            self._clients[client.name].end_round(event.round, cut)

    def _client(self, client: ClientInfo) -> dict[str, Any]:
        """Return one client's entry."""
        own = self._clients[client.name]
        first = self._changes.get(1, {}).get(client.name, client.cut)  # of the first round in any case
        return {
            "name": client.name,
            "cut": own.cut.copy() if self._rounds else [first],
            "examples": own.examples,
            "tokens": own.tokens,
            "train_examples": client.train_examples,
            "train_tokens": client.train_tokens,
            "eval_examples": client.eval_examples,
            "truncated": client.truncated,
            "trained_on": client.trained_on,
            "held_out": client.held_out,
            "loss": own.loss.copy(),
            "accuracy": own.accuracy.copy(),
            "train_loss": own.train_loss.copy(),
            "bytes_up": own.bytes_up,
            "bytes_down": own.bytes_down,
        }


def _spent(event: PrivacySpent) -> dict[str, Any]:
    """Return epsilon and the clipped updates of one round."""
    return {
        "round": event.round,
        "epsilon": _finite(event.epsilon),
        "epsilon_of_round": _finite(event.epsilon_of_round),
        "delta": event.delta,
        "clipped": event.clipped,
        "deviation": event.deviation,
    }


def _add_bytes(total: dict[str, dict[str, int]], traffic: Traffic) -> None:
    for role, count in traffic.up.items():
        total[role]["up"] += count
    for role, count in traffic.down.items():
        total[role]["down"] += count


def _improved(loss: list[float | None]) -> bool:
    """Return whether the last loss is below the first; true while there is only one."""
    if len(loss) < 2:
        return True
    first, last = loss[0], loss[-1]
    return first is not None and last is not None and last < first


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
