"""Train into a run folder, from the start or from its last checkpoint.

RunConfig --prepare--> RunSetup --begin | restore--> RunState --train, round by round--> run folder
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError

from splitft.adapters import AdapterState, with_folded, with_mean_of_own
from splitft.config import RunConfig, load
from splitft.data.tokens import Tokenised
from splitft.errors import RunError
from splitft.geometry import Span
from splitft.model.identity import tokenizer_digest, weight_digests
from splitft.model.precision import describe
from splitft.model.source import silence_transformers
from splitft.protocol.channel import Tap
from splitft.run.folder import Run, find_snapshot, fix_dtype, is_finished, open_log, put_adapter
from splitft.run.lock import hold
from splitft.run.promises import run_promises, run_started
from splitft.run.run_mode import as_begun, with_way
from splitft.run.same_inputs import check_inputs
from splitft.run.setup import RunSetup, prepare
from splitft.tracking.events import (
    CheckpointSaved,
    Event,
    Listener,
    RunDone,
    RunResumed,
    Warned,
)
from splitft.tracking.summary_writer import SummaryWriter
from splitft.tracking.trackers import open_trackers
from splitft.training import RunState, Simulation
from splitft.training.checkpoint import Snapshot, save_snapshot, what_is_safe

logger = logging.getLogger(__name__)


def train(
    config: RunConfig | Path | str,
    out: Path | str,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    listeners: Sequence[Listener] = (),
    tap: Tap | None = None,
) -> Run:
    """Train as configured, into the folder `out`; with `resume`, continue the run that is there.

    Raises RunError if `out` holds a run already (or, with `resume`, another one), and what `prepare` raises.
    """
    run, config = Run(Path(out)), config if isinstance(config, RunConfig) else load(config, overrides)
    config = as_begun(fix_dtype(config, run.folder, resume), run.folder, resume)
    snapshot = find_snapshot(run.folder, config, resume)
    if snapshot is not None and snapshot.state.round >= config.training.rounds and is_finished(run.folder):
        return run
    with hold(run.folder, "splitft train"):
        snapshot = find_snapshot(run.folder, config, resume)  # another process may have trained meanwhile
        return _train(run, config, snapshot, listeners, tap)


def _train(
    run: Run, config: RunConfig, snapshot: Snapshot | None, listeners: Sequence[Listener], tap: Tap | None
) -> Run:
    """Train into a run folder that this process holds."""
    with silence_transformers():
        prepared = prepare(config)  # raises before anything is written
        config = with_way(config, prepared.config.split.way)
        base, tokenizer = weight_digests(prepared.model), tokenizer_digest(prepared.model.tokenizer())
    if snapshot is not None:
        check_inputs(run.folder, base, tokenizer, prepared.facts)
    with (
        stopping(run.folder),
        contextlib.closing(prepared.server),
        contextlib.closing(open_log(run.folder, config, snapshot)) as log,
        open_trackers(config.trackers, run.folder, config.model_dump(mode="json")) as trackers,
        silence_transformers(),
    ):
        summary = SummaryWriter(run.folder)

        def listener(event: Event) -> None:
            log(event)
            summary(event)
            for other in (*listeners, *trackers):
                other(event)

        simulation = prepared.simulation(tap)
        if snapshot is None:
            state = _begin(prepared, listener, base, tokenizer)
        else:
            listener(RunResumed(round=snapshot.state.round + 1))
            for message in snapshot.passed_over:
                logger.warning("%s", message)
                listener(Warned(message=message))
            state = _restore(prepared, snapshot, simulation)
            _write_adapters(prepared, state, run)  # it may have stopped between checkpoint and adapter

        def save(state: RunState) -> None:
            path = save_snapshot(run.folder, _snapshot(prepared, state, simulation))
            _write_adapters(prepared, state, run)
            try:
                listener(CheckpointSaved(round=state.round, path=str(path.relative_to(run.folder))))
            finally:  # a listener may end the training here
                summary.write()

        prepared.trainer(simulation, listener, save).train(state)
        listener(RunDone(rounds=config.training.rounds))
        summary.write()
        run.report()
    return Run(run.folder)


@contextlib.contextmanager
def stopping(folder: Path) -> Iterator[None]:
    """Turn an error of the disk into a RunError that names the last complete checkpoint."""
    try:
        yield
    except BrokenPipeError:
        raise  # an error of the terminal, not of the disk
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"the run stopped writing to {folder} ({reason}); {what_is_safe(folder)}") from error


def _write_adapters(prepared: RunSetup, state: RunState, run: Run) -> None:
    """Write the global adapter, and the personal adapter of each client that has factors of its own."""
    model, ranks = prepared.model, prepared.ranks
    if prepared.config.aggregate.federated:
        put_adapter(_global_adapter(prepared, state), model, ranks, run.adapter_dir)
    elif len(prepared.clients) == 1:  # the only client's adapter is the run's
        put_adapter(state.adapters.updated(prepared.clients[0].private()), model, ranks, run.adapter_dir)
    own = _own(prepared, state)
    personal = [client for client in prepared.clients if client.name in own or client.private()]
    folders = run.name_personal(client.name for client in personal)
    for client in personal:
        mine = state.adapters.replace_B(own.get(client.name, AdapterState())).updated(client.private())
        put_adapter(with_folded(mine, state.folded), model, ranks, folders[client.name])


def _global_adapter(prepared: RunSetup, state: RunState) -> AdapterState:
    """Return the adapter of the whole run, with the folded updates.

    Where clients have factors B of their own it has their mean, for a client that is new: nobody trained it.
    """
    own = list(_own(prepared, state).values())
    if not own:
        return with_folded(state.adapters, state.folded)
    return with_mean_of_own(state.adapters, own)


def _begin(prepared: RunSetup, listener: Listener, base: Mapping[str, str], tokenizer: str) -> RunState:
    """Report how a new run begins, and return its state before round 1."""
    config, model, fleet = prepared.config, prepared.model, prepared.cut_schedule.fleet
    longest = max(map(len, prepared.text.examples))
    found = {
        "defences": run_promises(config, fleet, prepared.facts, model.shape.width, longest),
        "machines": prepared.cut_schedule.machines(),
        "base": base,
        "tokenizer": tokenizer,
        "devices": str(prepared.devices),
        "precision": describe(model.spec.dtype, prepared.devices.every) + model.rounding,
    }
    listener(run_started(config, model.shape.blocks, prepared.facts).model_copy(update=found))
    for choice in prepared.chosen:
        listener(choice)
    _warn_of_losses(prepared.text, config, listener)
    for message in (*prepared.cut_schedule.left_out, *prepared.cut_schedule.misfits):
        listener(Warned(message=message))
    return prepared.initial()


def _restore(prepared: RunSetup, snapshot: Snapshot, simulation: Simulation) -> RunState:
    """Set every party to the state in a checkpoint, and return the run's state."""
    state, server = snapshot.state, prepared.server
    received_factors = _restore_codecs(prepared, snapshot, simulation)
    for client in prepared.clients:
        span = Span(0, state.cuts[client.name])
        own = snapshot.own.get(client.name, AdapterState())
        exact = state.adapters.within(span)
        adapters = exact.updated(received_factors[client.name].fill_from(exact)).replace_B(own)
        client.restore(
            span.stop,
            adapters.updated(snapshot.private.get(client.name, AdapterState())),
            snapshot.steps[client.name],
            snapshot.client_moments.get(client.name, {}),
            state.folded.within(span),
        )
        server_span = Span(span.stop, prepared.model.shape.blocks)
        server.client_states.add_own(client.name, own.within(server_span))
    server.moments.update(snapshot.server_moments)
    server.place(state.cuts)
    return state


def _restore_codecs(
    prepared: RunSetup, snapshot: Snapshot, simulation: Simulation
) -> dict[str, AdapterState]:
    """Restore the codecs' state, and return the global factors as each client received them."""
    sent = {}
    for client in prepared.clients:
        private = snapshot.private.get(client.name, AdapterState())
        within = snapshot.state.adapters.within(Span(0, snapshot.state.cuts[client.name]))
        shared = AdapterState({key: one for key, one in within.items() if key not in private})
        sent[client.name] = prepared.ranks.part_sent(shared)
    return simulation.restore_codecs(snapshot.memories, sent)


def _warn_of_losses(text: Tokenised, config: RunConfig, listener: Listener) -> None:
    """Warn of text that is not trained on."""
    count = len(text.examples)
    if text.truncated:
        message = f"{text.truncated} of {count} examples were cut off at {config.data.max_tokens} tokens"
        listener(Warned(message=f"{message} (data.max_tokens)"))
    if text.dropped:
        listener(Warned(message=f"{text.dropped} records were left out: nothing in them could be learnt"))


def _snapshot(prepared: RunSetup, state: RunState, simulation: Simulation) -> Snapshot:
    """Return the state of all parties for a checkpoint."""
    kept = {client.name: client.optimizer_state() for client in prepared.clients}
    return Snapshot(
        state,
        {name: steps for name, (steps, _) in kept.items()},
        {name: moments for name, (_, moments) in kept.items() if moments},
        {slot: moments for slot, moments in prepared.server.moments.items() if moments},
        {client.name: own for client in prepared.clients if (own := client.private())},
        simulation.codec_states(),
        _own(prepared, state),
    )


def _own(prepared: RunSetup, state: RunState) -> dict[str, AdapterState]:
    """Return each client's own factors over all blocks; none with rules that share everything."""
    states = prepared.server.client_states
    if not prepared.ranks.keeps_own:
        return {}
    start = state.adapters.select("B")
    return {
        client.name: start.updated(client.own()).updated(states.own.get(client.name, AdapterState()))
        for client in prepared.clients
    }
