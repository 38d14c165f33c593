"""From a configuration to a run: the one place, with the command line, that sees the whole of it.

RunConfig --prepare--> model, text, shares, clients, server --train--> run folder
                                                             config.yaml  events.jsonl  summary.json
                                                             checkpoints/  adapter/  report.html
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from splitft import __version__
from splitft.config import RunConfig, dump, load
from splitft.data.corpora import read_records
from splitft.data.shares import divide, values_of
from splitft.data.text import BatchStream, Example, eval_batches, held_out
from splitft.data.tokens import Tokenised, tokenise
from splitft.errors import ConfigError, GeometryError, RunError
from splitft.export import with_adapter, write_merged, write_peft
from splitft.geometry import Span, check_cut
from splitft.model import Model, open_model
from splitft.protocol import Terms
from splitft.runtime import Client, RunState, Server, Simulation, train_rounds
from splitft.runtime.checkpoint import Snapshot, latest, load_snapshot, save_snapshot
from splitft.runtime.line import Tap
from splitft.runtime.ranks import Ranks
from splitft.tracking.events import (
    CheckpointSaved,
    ClientFacts,
    Event,
    EventLog,
    Listener,
    RunDone,
    RunResumed,
    RunStarted,
    Warned,
    read_events,
    settled,
)
from splitft.tracking.summary import write_summary


@dataclass(frozen=True)
class Run:
    """A run folder, finished or not."""

    folder: Path

    @cached_property
    def config(self) -> RunConfig:
        """The configuration that it was made with."""
        return load(self._existing("config.yaml"))

    @cached_property
    def summary(self) -> dict[str, Any]:
        """`summary.json`, as the design describes it."""
        summary: dict[str, Any] = json.loads(self._existing("summary.json").read_text(encoding="utf-8"))
        return summary

    @property
    def adapter_dir(self) -> Path:
        """The global adapter as a PEFT folder."""
        return self.folder / "adapter"

    def report(self) -> Path:
        """Write `report.html` anew and return its path."""
        from splitft.tracking.report import write_report

        return write_report([self.folder], self.folder / "report.html")

    def _existing(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise RunError(f"{self.folder} is not a run folder: it has no {name}")
        return path


@dataclass(frozen=True)
class Prepared:
    """All parties of a run, ready for their first round."""

    config: RunConfig
    model: Model
    ranks: Ranks
    server: Server
    clients: tuple[Client, ...]
    facts: tuple[ClientFacts, ...]
    text: Tokenised
    terms: Terms

    def simulation(self, tap: Tap | None = None) -> Simulation:
        """The parties on lines in this process."""
        return Simulation(self.server, self.clients, self.terms, tap)

    def initial(self) -> RunState:
        """Before round 1."""
        cuts = {facts.name: facts.cut for facts in self.facts}
        return RunState(0, cuts, self.server.initial())


def prepare(config: RunConfig) -> Prepared:
    """Read model and text, divide it, and set up every party.

    Raises a SplitftError that names the key to mend if the configuration does not fit the model or the text.
    """
    model = open_model(config.model)
    blocks = model.shape.blocks
    cuts = _cuts(config, blocks)
    shares = config.clients.shares
    column = shares.column if shares.by in ("label", "natural") else None
    records = read_records(config.data, column, config.seed)
    text = tokenise(records, model.tokenizer(), config.data.max_tokens, config.data.separator)
    _check_length(text, model)
    parts = divide(text.examples, config.clients.count, shares, config.seed)
    ranks = Ranks(config.lora, blocks, config.aggregate.rule, config.seed)
    names = values_of(text.examples) if shares.by == "natural" else None
    clients, facts = [], []
    for index, (part, cut) in enumerate(zip(parts, cuts, strict=True)):
        name = names[index] if names else f"client-{index + 1}"
        own = [text.examples[i] for i in part]
        client, fact = _client(config, model, ranks, name, index, cut, own)
        clients.append(client)
        facts.append(fact)
    server = Server(model, Span(min(cuts), blocks), ranks, config.split, config.training)
    terms = Terms(
        width=model.shape.width,
        dtype=model.dtype,
        adapter_dtype=torch.promote_types(model.dtype, torch.float32),
        wire=config.wire,
        labels_travel=config.split.labels == "server",
    )
    return Prepared(config, model, ranks, server, tuple(clients), tuple(facts), text, terms)


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
    snapshot = _open_folder(run.folder, config, resume)
    if snapshot is not None and snapshot.state.round >= config.training.rounds and _is_finished(run.folder):
        return run
    with contextlib.closing(EventLog(run.folder / "events.jsonl")) as log, _quiet():
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


def generate(folder: Path | str, prompt: str, *, max_new_tokens: int = 60, adapter: bool = True) -> str:
    """Continue a prompt with a run's model, by greedy decoding; without its adapter if so asked."""
    run = Run(Path(folder))
    with _quiet():
        model = open_model(run.config.model)
        tokenizer = model.tokenizer()
        whole = with_adapter(run.adapter_dir, model.path, model.dtype)
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        if not inputs["input_ids"].shape[1]:
            raise RunError("the prompt is empty; give some words to continue")
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, "repetition_penalty": 1.1}
        with contextlib.nullcontext() if adapter else whole.disable_adapter():
            tokens = whole.generate(**inputs, **options, pad_token_id=tokenizer.eos_token_id)
    continuation: str = tokenizer.decode(tokens[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return continuation


def export(folder: Path | str, to: Path | str, *, merged: bool = False) -> Path:
    """Copy a run's adapter as a PEFT folder, or write the base model with it folded in.

    Raises RunError if `to` exists and is not empty, or the run has no adapter yet.
    """
    run, to = Run(Path(folder)), Path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RunError(f"{to} exists already; choose another --to")
    if not (run.adapter_dir / "adapter_config.json").is_file():
        raise RunError(f"{run.folder} holds no adapter; it is written when a run has finished a round")
    if merged:
        with _quiet():
            return write_merged(run.adapter_dir, open_model(run.config.model), to)
    shutil.copytree(run.adapter_dir, to, dirs_exist_ok=True)
    return to


# --------------------------------------------------------------------------------------------------------


def _cuts(config: RunConfig, blocks: int) -> tuple[int, ...]:
    cuts = config.cuts
    assert cuts is not None  # the configuration refuses `auto` without a controller that decides
    for index, cut in enumerate(cuts):
        try:
            check_cut(cut, blocks, whole_allowed=False)
        except GeometryError as error:
            one = f"[{index}]" if isinstance(config.clients.cuts, tuple) else ""
            raise GeometryError(f"clients.cuts{one}: {error}") from error
    return cuts


def _check_length(text: Tokenised, model: Model) -> None:
    longest, most = max(map(len, text.examples)), model.shape.max_positions
    if longest > most:
        raise ConfigError(
            f"data.max_tokens: an example has {longest} tokens, but the model takes {most} positions "
            f"at most; give data.max_tokens={most} or less"
        )


def _client(
    config: RunConfig, model: Model, ranks: Ranks, name: str, index: int, cut: int, own: list[Example]
) -> tuple[Client, ClientFacts]:
    training, data = config.training, config.data
    to_train, kept_out = held_out(own, data.holdout, config.seed, index)
    stream = BatchStream(to_train, training.batch_size, training.batch_tokens, config.seed, index)
    batches = eval_batches(kept_out, training.batch_size, training.batch_tokens, data.eval_examples)
    client = Client(name, model, cut, config.split.labels, ranks, training, stream, batches)
    facts = ClientFacts(
        name=name,
        cut=cut,
        train_examples=len(to_train),
        train_tokens=sum(map(len, to_train)),
        eval_examples=sum(len(batch.lengths) for batch in batches),
        truncated=sum(example.truncated for example in own),
    )
    return client, facts


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


def _open_folder(folder: Path, config: RunConfig, resume: bool) -> Snapshot | None:
    """Make a run folder, or find where the one that is there can continue."""
    written = folder / "config.yaml"
    if resume:
        if not written.is_file():
            raise RunError(
                f"{folder} holds no run to resume (no config.yaml); leave --resume out to start one"
            )
        _check_same(load(written), config, folder)
        number = latest(folder)
        if number is None:
            for file in ("events.jsonl", "summary.json"):  # stopped before a round was saved: begin again
                (folder / file).unlink(missing_ok=True)
        written.write_text(dump(config), encoding="utf-8")
        return None if number is None else load_snapshot(folder, number)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "holds a run already" if written.is_file() else "exists and is not empty"
        raise RunError(f"{folder} {what}; continue it with --resume, or give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    written.write_text(dump(config), encoding="utf-8")
    return None


def _check_same(old: RunConfig, new: RunConfig, folder: Path) -> None:
    """Only more rounds may be asked of a run that is resumed."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    changed = [key for key in after if before[key] != after[key] and key != "training.rounds"]
    if changed:
        listed = ", ".join(f"{key} (was {before[key]!r}, now {after[key]!r})" for key in changed[:4])
        raise RunError(f"{folder} was made with another configuration: {listed}; give another --out")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _is_finished(folder: Path) -> bool:
    return any(isinstance(event, RunDone) for event in settled(read_events(folder / "events.jsonl")))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and advice of the libraries below, and offline where the hub is not asked."""
    from transformers.utils import logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
