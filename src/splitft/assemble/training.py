"""Train into a run folder, from the start or from its last checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from splitft import __version__
from splitft.assemble.folder import Run, is_finished, open_folder
from splitft.assemble.parties import Prepared, prepare
from splitft.assemble.quiet import quiet
from splitft.config import RunConfig, load
from splitft.data.tokens import Tokenised
from splitft.export import write_peft
from splitft.geometry import Span
from splitft.runtime import RunState, train_rounds
from splitft.runtime.checkpoint import Snapshot, save_snapshot
from splitft.runtime.line import Tap
from splitft.tracking.events import (
    CheckpointSaved,
    Event,
    EventLog,
    Listener,
    RunDone,
    RunResumed,
    RunStarted,
    Warned,
)
from splitft.tracking.summary import write_summary


def train(
    config: RunConfig | Path | str,
    out: Path | str,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    listeners: Sequence[Listener] = (),
    tap: Tap | None = None,
) -> Run:
    """Train as the configuration says, into the folder `out`; with `resume`, continue what is there.

    Raises RunError if `out` holds a run already (or, with `resume`, another one), and what `prepare` raises.
    """
    config = config if isinstance(config, RunConfig) else load(config, overrides)
    run = Run(Path(out))
    snapshot = open_folder(run.folder, config, resume)
    if snapshot is not None and snapshot.state.round >= config.training.rounds and is_finished(run.folder):
        return run
    with contextlib.closing(EventLog(run.folder / "events.jsonl")) as log, quiet():
        prepared = prepare(config)

        def listener(event: Event) -> None:
            log(event)
            for other in listeners:
                other(event)

        state = _begin(prepared, snapshot, listener)
        simulation = prepared.simulation(tap)

        def save(state: RunState) -> None:
            path = save_snapshot(run.folder, _snapshot(prepared, state))
            write_peft(state.adapters, prepared.model, prepared.ranks.scale, run.adapter_dir)
            listener(CheckpointSaved(round=state.round, path=str(path.relative_to(run.folder))))
            write_summary(run.folder)

        def controller(number: int, cuts: Any) -> Any:
            return cuts

        train_rounds(
            state, prepared.server, simulation, prepared.ranks, config.training, controller, listener, save
        )
        listener(RunDone(rounds=config.training.rounds))
    write_summary(run.folder)
    run.report()
    return Run(run.folder)


def _begin(prepared: Prepared, snapshot: Snapshot | None, listener: Listener) -> RunState:
    """Tell how the run begins, and put every party where the checkpoint has it."""
    config = prepared.config
    if snapshot is None:
        listener(
            RunStarted(
                version=__version__,
                method=config.method,
                seed=config.seed,
                model=config.model.name,
                blocks=prepared.model.shape.blocks,
                rounds=config.training.rounds,
                steps=config.training.steps,
                labels=config.split.labels,
                clients=prepared.facts,
            )
        )
        _warn_of_losses(prepared.text, config, listener)
        return prepared.initial()
    listener(RunResumed(round=snapshot.state.round + 1))
    state = snapshot.state
    for client in prepared.clients:
        cut = state.cuts[client.name]
        known = state.adapters.within(Span(0, cut))
        client.restore(cut, known, snapshot.steps[client.name], snapshot.client_moments.get(client.name, {}))
    prepared.server.moments.update(snapshot.server_moments)
    prepared.server.place(state.cuts)
    return state


def _warn_of_losses(text: Tokenised, config: RunConfig, listener: Listener) -> None:
    count = len(text.examples)
    if text.truncated:
        message = f"{text.truncated} of {count} examples were cut off at {config.data.max_tokens} tokens"
        listener(Warned(message=f"{message} (data.max_tokens)"))
    if text.dropped:
        listener(Warned(message=f"{text.dropped} records were left out: nothing in them could be learnt"))


def _snapshot(prepared: Prepared, state: RunState) -> Snapshot:
    kept = {client.name: client.kept() for client in prepared.clients}
    return Snapshot(
        state,
        {name: steps for name, (steps, _) in kept.items()},
        {name: moments for name, (_, moments) in kept.items() if moments},
        {slot: moments for slot, moments in prepared.server.moments.items() if moments},
    )
