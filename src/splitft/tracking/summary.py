"""A run in one page of JSON: a pure fold over its events.

    [RunStarted, CutsChanged, Evaluated(0), StepDone..., RoundDone(1), Evaluated(1), ...] --> summary.json

The fold needs no finished run: after a crash it tells what is known. Losses are nats per labelled
token. `bytes` counts training and adapters by role and direction; what evaluation sent stands apart in
`evaluation_bytes`, because a deployment evaluates as often as it likes. Numbers that are not finite
become null, so that the file is plain JSON.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from splitft.tracking.events import (
    ClientFacts,
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


def summarise(events: Iterable[Event]) -> dict[str, Any]:
    """Fold events into the summary; without a RunStarted there is nothing to tell, and it is empty.

    `eval_loss` and each client's `loss` have one number before training and one after each round;
    `cut`, `train_loss` and `aggregation_error` have one a round. `examples` and `tokens` are what was
    trained on, counted as often as it was seen.
    """
    events = settled(events)
    started = next((event for event in events if isinstance(event, RunStarted)), None)
    if started is None:
        return {}
    rounds = [event for event in events if isinstance(event, RoundDone)]
    evaluations = [event for event in events if isinstance(event, Evaluated)]
    steps = [event for event in events if isinstance(event, StepDone)]
    cuts = _cuts_by_round(started, events, len(rounds))
    clients = [_client(facts, cuts, rounds, evaluations, steps) for facts in started.clients]
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
    """Epsilon after each round, and what the bound did in it; None if updates were not bounded."""
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
    """Epsilon after a round, in one sentence."""
    if spent["epsilon"] is None:
        return f"Updates were bounded without noise ({spent['clipped']} of round {spent['round']} clipped)."
    return (
        f"After round {spent['round']}, epsilon {spent['epsilon']:.3g} at delta {spent['delta']:g} for a "
        f"client that took part in every round ({spent['epsilon_of_round']:.3g} for one round)."
    )


def write_summary(out: Path) -> dict[str, Any]:
    """Fold `events.jsonl` of a run folder into its `summary.json`, replaced in one stroke."""
    summary = summarise(read_events(out / "events.jsonl"))
    draft = out / "summary.json.draft"
    draft.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(draft, out / "summary.json")
    return summary


CLIENT_HEADINGS = ("client", "cut", "examples", "tokens", "loss before", "loss after", "MB up", "MB down")
"""Columns of `client_rows`."""


def client_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row of text a client, for a terminal and for a page: what it trained, gained and sent."""
    return [
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


def headline(summary: Mapping[str, Any]) -> str:
    """One sentence on the held-out loss, and the clients that did not gain."""
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
    """From the first loss to the last, in per cent; a dash where either is not known."""
    first, last = (losses[0], losses[-1]) if losses else (None, None)
    return f"{100 * (last / first - 1):+.1f} %" if first and last is not None else "–"


def loss_text(losses: Sequence[float | None], index: int) -> str:
    """One loss of several as text; a dash where it was not measured or is not finite."""
    value = losses[index] if losses else None
    return "–" if value is None else f"{value:.3f}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _in_short(cuts: Sequence[int]) -> str:
    """The cuts of a client in order of rounds, each as often as it changed."""
    moves = [cut for index, cut in enumerate(cuts) if index == 0 or cut != cuts[index - 1]]
    return " → ".join(map(str, moves)) if len(moves) <= 3 else f"{moves[0]} → … → {moves[-1]}"


def _client(
    facts: ClientFacts,
    cuts: list[Mapping[str, int]],
    rounds: list[RoundDone],
    evaluations: list[Evaluated],
    steps: list[StepDone],
) -> dict[str, Any]:
    """One client's line of the summary."""
    own = [step for step in steps if step.client == facts.name]
    traffic = [step.traffic for step in own]
    traffic += [done.traffic[facts.name] for done in rounds if facts.name in done.traffic]
    return {
        "name": facts.name,
        "cut": [by_name.get(facts.name, facts.cut) for by_name in cuts],
        "examples": sum(step.examples for step in own),
        "tokens": sum(step.tokens for step in own),
        "train_examples": facts.train_examples,
        "train_tokens": facts.train_tokens,
        "eval_examples": facts.eval_examples,
        "truncated": facts.truncated,
        "trained_on": facts.trained_on,
        "held_out": facts.held_out,
        "loss": [_finite(event.by_client.get(facts.name, math.nan)) for event in evaluations],
        "train_loss": [_mean_loss(own, done.round) for done in rounds],
        "bytes_up": sum(sum(one.up.values()) for one in traffic),
        "bytes_down": sum(sum(one.down.values()) for one in traffic),
    }


def _cuts_by_round(started: RunStarted, events: Iterable[Event], rounds: int) -> list[Mapping[str, int]]:
    """Cuts in force in rounds 1 to `rounds`; at least the first round's, which a run starts with."""
    changes = {event.round: event.cuts for event in events if isinstance(event, CutsChanged)}
    now: dict[str, int] = {facts.name: facts.cut for facts in started.clients}
    by_round: list[Mapping[str, int]] = []
    for number in range(1, max(rounds, 1) + 1):
        now = {**now, **changes.get(number, {})}
        by_round.append(now)
    return by_round


def _by_role(traffic: Iterable[Traffic]) -> dict[str, dict[str, int]]:
    """Total bytes by role, then by direction; every role is there, if only with zeros."""
    total = {role: {"up": 0, "down": 0} for role in get_args(Role)}
    for one in traffic:
        for role, count in one.up.items():
            total[role]["up"] += count
        for role, count in one.down.items():
            total[role]["down"] += count
    return total


def _mean_loss(steps: Iterable[StepDone], number: int) -> float | None:
    """Token-weighted training loss of one round; None for who did not take part."""
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
    """The simulated clock: seconds by round, by client and leg, idle and peak memory by client and server."""
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
    """Time from the first to the last event of each process that worked on the run, added up."""
    total, since, last = 0.0, None, 0.0
    for event in events:
        if since is None or isinstance(event, RunStarted | RunResumed):
            total += last - since if since is not None else 0.0
            since = event.t
        last = event.t
    return round(total + last - since, 3) if since is not None else 0.0


def _improved(loss: list[float | None]) -> bool:
    """Whether the last loss is below the first; too early to tell counts as yes."""
    if len(loss) < 2:
        return True
    first, last = loss[0], loss[-1]
    return first is not None and last is not None and last < first


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
