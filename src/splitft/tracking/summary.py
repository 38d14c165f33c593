"""The summary of a run: a pure fold over its events.

    [RunStarted, CutsChanged, Evaluated(0), StepDone..., RoundDone(1), Evaluated(1), ...] --> summary.json

The run need not be finished: after a crash, the summary holds what is known. Losses are nats per labeled
token. `bytes` counts training and adapters by role and direction; evaluation is counted apart, in
`evaluation_bytes`, because a deployment may evaluate at any time. Numbers that are not finite become null, so
that the file is plain JSON.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from splitft.files import write_whole
from splitft.tracking.events import (
    ClientInfo,
    CutsChanged,
    Evaluated,
    Event,
    PrivacySpent,
    Role,
    RoundDone,
    RoundTimed,
    RunDone,
    RunResumed,
    RunStarted,
    SiteChanged,
    StepDone,
    Traffic,
    Warned,
)
from splitft.tracking.log import read_events, settled
from splitft.tracking.table import Table


def summarise(events: Iterable[Event]) -> dict[str, Any]:
    """Return the summary of events; empty without a RunStarted.

    `eval_loss` and each client's `loss` have one number before training and one after each round; `cut`,
    `train_loss` and `aggregation_error` have one for each round. `examples` and `tokens` count what was
    trained on, repetitions included.
    """
    events = settled(events)
    started = next((event for event in events if isinstance(event, RunStarted)), None)
    if started is None:
        return {}
    rounds = [event for event in events if isinstance(event, RoundDone)]
    evaluations = [event for event in events if isinstance(event, Evaluated)]
    steps = [event for event in events if isinstance(event, StepDone)]
    cuts = _cuts_by_round(started, events, len(rounds))
    clients = [_client(client, cuts, rounds, evaluations, steps) for client in started.clients]
    training = [*(step.traffic for step in steps), *(one for done in rounds for one in done.traffic.values())]
    timed = [event for event in events if isinstance(event, RoundTimed)]
    return {
        "version": started.version,
        "method": started.method,
        "seed": started.seed,
        "model": started.model,
        "labels": started.labels,
        "privacy": started.privacy,
        "defences": list(started.defences),
        "privacy_spent": _privacy_spent(events),
        "finished": any(isinstance(event, RunDone) for event in events),
        "rounds": len(rounds),
        "eval_loss": [_finite(event.loss) for event in evaluations],
        "not_improved": [client["name"] for client in clients if not _improved(client["loss"])],
        "clients": clients,
        "bytes": _by_role(training),
        "evaluation_bytes": _by_role(one for event in evaluations for one in event.traffic.values()),
        "aggregation_error": [_finite(event.aggregation_error) for event in rounds],
        "steps": len(steps),
        "tokens": sum(step.tokens for step in steps),
        "seconds_by_leg": _seconds_by_leg(steps),
        "wall_seconds": _wall_seconds(events),
        "simulated_seconds": sum(event.seconds for event in timed) if timed else None,
        "simulated": _simulated(timed, started.machines) if timed else None,
        "warnings": [event.message for event in events if isinstance(event, Warned | SiteChanged)],
    }


def _privacy_spent(events: Iterable[Event]) -> list[dict[str, Any]] | None:
    """Return epsilon and the clipped updates of each round; None if updates were not bounded."""
    spent = [event for event in events if isinstance(event, PrivacySpent)]
    return [
        {
            "round": event.round,
            "epsilon": _finite(event.epsilon),
            "epsilon_of_round": _finite(event.epsilon_of_round),
            "delta": event.delta,
            "clipped": event.clipped,
            "deviation": event.deviation,
        }
        for event in spent
    ] or None


def spent_text(spent: Mapping[str, Any]) -> str:
    """Describe epsilon after a round in one sentence."""
    if spent["epsilon"] is None:
        return f"Updates were bounded without noise ({spent['clipped']} of round {spent['round']} clipped)."
    return (
        f"After round {spent['round']}, epsilon {spent['epsilon']:.3g} at delta {spent['delta']:g} for a "
        f"client that took part in every round ({spent['epsilon_of_round']:.3g} for one round)."
    )


def write_summary(out: Path) -> dict[str, Any]:
    """Write `summary.json` of a run folder from its `events.jsonl`, and return it."""
    summary = summarise(read_events(out / "events.jsonl"))
    write_whole(out / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return summary


def client_table(summary: Mapping[str, Any]) -> Table:
    """Return one row for each client: what it trained on, its losses and its traffic."""
    rows = [
        (
            client["name"],
            _in_short(client["cut"]),
            f"{client['examples']:,}",
            f"{client['tokens']:,}",
            loss_text(client["loss"], 0),
            loss_text(client["loss"], -1),
            f"{client['bytes_up'] / 1e6:.1f}",
            f"{client['bytes_down'] / 1e6:.1f}",
        )
        for client in summary["clients"]
    ]
    headings = ("client", "cut", "examples", "tokens", "loss before", "loss after", "MB up", "MB down")
    return Table(headings, rows)


def headline(summary: Mapping[str, Any]) -> str:
    """Describe the change of the held-out loss, and name the clients on which it did not fall."""
    losses = summary["eval_loss"]
    if len(losses) < 2 or losses[0] is None or losses[-1] is None:
        return "Held-out loss: not measured before and after."
    text = f"Held-out loss of all clients: {losses[0]:.3f} before, {losses[-1]:.3f} after"
    text += f" ({change_text(losses)})." if losses[0] else "."
    lacking, clients = summary["not_improved"], len(summary["clients"])
    if not lacking:
        return f"{text} It fell on every client."
    who = ", ".join(lacking) if len(lacking) <= 5 else f"{len(lacking)} of {clients} clients"
    return f"{text} It did not fall on {who}."


def change_text(losses: Sequence[float | None]) -> str:
    """Return the change from the first loss to the last in percent; a dash where either is unknown."""
    first, last = (losses[0], losses[-1]) if losses else (None, None)
    return f"{100 * (last / first - 1):+.1f} %" if first and last is not None else "–"


def loss_text(losses: Sequence[float | None], index: int) -> str:
    """Return one of the losses as text; a dash where it was not measured or is not finite."""
    value = losses[index] if losses else None
    return "–" if value is None else f"{value:.3f}"


def clock(seconds: float) -> str:
    """Format seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _in_short(cuts: Sequence[int]) -> str:
    """Return a client's cuts by round, without repetitions; of more than three, the first and the last."""
    moves = [cut for index, cut in enumerate(cuts) if index == 0 or cut != cuts[index - 1]]
    return " → ".join(map(str, moves)) if len(moves) <= 3 else f"{moves[0]} → … → {moves[-1]}"


def _client(
    client: ClientInfo,
    cuts: list[Mapping[str, int]],
    rounds: list[RoundDone],
    evaluations: list[Evaluated],
    steps: list[StepDone],
) -> dict[str, Any]:
    """Return one client's entry of the summary."""
    own = [step for step in steps if step.client == client.name]
    traffic = [step.traffic for step in own]
    traffic += [done.traffic[client.name] for done in rounds if client.name in done.traffic]
    return {
        "name": client.name,
        "cut": [by_name.get(client.name, client.cut) for by_name in cuts],
        "examples": sum(step.examples for step in own),
        "tokens": sum(step.tokens for step in own),
        "train_examples": client.train_examples,
        "train_tokens": client.train_tokens,
        "eval_examples": client.eval_examples,
        "truncated": client.truncated,
        "trained_on": client.trained_on,
        "held_out": client.held_out,
        "loss": [_finite(event.by_client.get(client.name, math.nan)) for event in evaluations],
        "train_loss": [_mean_loss(own, done.round) for done in rounds],
        "bytes_up": sum(sum(one.up.values()) for one in traffic),
        "bytes_down": sum(sum(one.down.values()) for one in traffic),
    }


def _cuts_by_round(started: RunStarted, events: Iterable[Event], rounds: int) -> list[Mapping[str, int]]:
    """Return the cuts of rounds 1 to `rounds`; of the first round in any case."""
    changes = {event.round: event.cuts for event in events if isinstance(event, CutsChanged)}
    now: dict[str, int] = {client.name: client.cut for client in started.clients}
    by_round: list[Mapping[str, int]] = []
    for number in range(1, max(rounds, 1) + 1):
        now = {**now, **changes.get(number, {})}
        by_round.append(now)
    return by_round


def _by_role(traffic: Iterable[Traffic]) -> dict[str, dict[str, int]]:
    """Return total bytes by role and direction; every role is present."""
    total = {role: {"up": 0, "down": 0} for role in get_args(Role)}
    for one in traffic:
        for role, count in one.up.items():
            total[role]["up"] += count
        for role, count in one.down.items():
            total[role]["down"] += count
    return total


def _mean_loss(steps: Iterable[StepDone], number: int) -> float | None:
    """Return the token-weighted training loss of one round; None without steps in it."""
    losses = [(step.loss, step.tokens) for step in steps if step.round == number]
    tokens = sum(count for _, count in losses)
    return _finite(sum(loss * count for loss, count in losses) / tokens) if tokens else None


def _seconds_by_leg(steps: Iterable[StepDone]) -> dict[str, float]:
    total: defaultdict[str, float] = defaultdict(float)
    for step in steps:
        for leg, seconds in step.seconds.items():
            total[leg] += seconds
    return {leg: round(seconds, 6) for leg, seconds in total.items()}


def _simulated(timed: Iterable[RoundTimed], machines: Mapping[str, str]) -> dict[str, Any]:
    """Return the simulated clock's seconds by round and by client and leg, idle seconds and peak memory."""
    legs: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    idle: defaultdict[str, float] = defaultdict(float)
    memory: defaultdict[str, float] = defaultdict(float)
    for event in timed:
        for client, seconds in event.legs.items():
            for leg, spent in seconds.items():
                legs[client][leg] += spent
        for who, spent in event.idle.items():
            idle[who] += spent
        for who, needed in event.memory_bytes.items():
            memory[who] = max(memory[who], needed)
    return {
        "seconds": [event.seconds for event in timed],
        "move_seconds": [event.move_seconds for event in timed],
        "weight_bytes": sum(event.weight_bytes for event in timed),
        "legs": {client: dict(seconds) for client, seconds in legs.items()},
        "idle": dict(idle),
        "memory_bytes": dict(memory),
        "machines": dict(machines),
    }


def _wall_seconds(events: Iterable[Event]) -> float:
    """Return the time from the first to the last event of each process of the run, added up."""
    total, since, last = 0.0, None, 0.0
    for event in events:
        if since is None or isinstance(event, RunStarted | RunResumed):
            total += last - since if since is not None else 0.0
            since = event.t
        last = event.t
    return round(total + last - since, 3) if since is not None else 0.0


def _improved(loss: list[float | None]) -> bool:
    """Return whether the last loss is below the first; true while there is only one."""
    if len(loss) < 2:
        return True
    first, last = loss[0], loss[-1]
    return first is not None and last is not None and last < first


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
