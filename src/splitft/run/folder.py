"""A run's folder: its content, when a run in it may continue, and the uses of a finished run.

config.yaml  events.jsonl  summary.json  checkpoints/  adapter/  personal/  report.html
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from splitft.adapters import AdapterState
from splitft.config import RunConfig, dump, load
from splitft.errors import RunError
from splitft.files import whole_folder, write_whole
from splitft.model import Model, open_model
from splitft.model.devices import take_devices
from splitft.model.precision import AUTO, resolve
from splitft.model.source import silence_transformers
from splitft.names import file_safe, is_file_safe
from splitft.peft_folder import check_whole, with_adapter, write_merged, write_peft
from splitft.plugins import PluginFile, keep_copies
from splitft.run.lock import LOCK
from splitft.run.same_inputs import moved_keys
from splitft.seals import write_sums
from splitft.tracking.events import RunDone
from splitft.tracking.log import EventLog, read_events, settled
from splitft.training.checkpoint import Snapshot, load_latest, set_aside_after
from splitft.training.ranks import RankPolicy

NAMES = "names.json"
"""File in `personal/`: the folder of each client, if one is not called like its client."""


@dataclass(frozen=True)
class Run:
    """A run folder, finished or not."""

    folder: Path

    @cached_property
    def config(self) -> RunConfig:
        """The configuration of the run."""
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

    @property
    def personal(self) -> dict[str, Path]:
        """The adapter of each client that has factors of its own, by the client's name; none if all share."""
        own = self.folder / "personal"
        folders = sorted(path.name for path in own.glob("[!.]*") if path.is_dir())
        clients = {folder: client for client, folder in _read_names(own / NAMES).items()}
        return {clients.get(folder, folder): own / folder for folder in folders}

    def name_personal(self, clients: Iterable[str]) -> dict[str, Path]:
        """Return the folder to write each client's own adapter to; a name that is no file name is noted."""
        own, folders = self.folder / "personal", file_safe(clients)
        if any(client != folder for client, folder in folders.items()):
            write_whole(own / NAMES, json.dumps(folders, indent=2, ensure_ascii=False) + "\n")
        return {client: own / folder for client, folder in folders.items()}

    def report(self) -> Path:
        """Write `report.html` anew and return its path."""
        from splitft.report.page import write_report

        return write_report([self.folder], self.folder / "report.html")

    def _existing(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise RunError(f"{self.folder} is not a run folder: it has no {name}")
        return path


def find_snapshot(folder: Path, config: RunConfig, resume: bool) -> Snapshot | None:
    """Return the last whole checkpoint, from which a run can continue; None for a new run. Changes nothing.

    Raises RunError if the folder cannot be used as asked.
    """
    written = folder / "config.yaml"
    if resume:
        if not written.is_file():
            raise RunError(
                f"{folder} holds no run to resume (no config.yaml); leave --resume out to start one"
            )
        _check_same(load(written), config, folder)
        return load_latest(folder)
    if folder.exists() and (not folder.is_dir() or any(one.name != LOCK for one in folder.iterdir())):
        what = "holds a run already" if written.is_file() else "exists and is not empty"
        raise RunError(f"{folder} {what}; continue it with --resume, or give another --out")
    return None


def fix_dtype(config: RunConfig, folder: Path, resume: bool) -> RunConfig:
    """Replace `model.dtype: auto` by the type of the run to resume, or else by this machine's fastest."""
    written = folder / "config.yaml"
    known = resume and config.model.dtype == AUTO and written.is_file()
    model = config.model.model_copy(update={"dtype": load(written).model.dtype}) if known else config.model
    return config.model_copy(update={"model": resolve(model, take_devices(config.devices).every)})


def open_log(folder: Path, config: RunConfig, snapshot: Snapshot | None) -> EventLog:
    """Make the run folder, or open it again, and open its log.

    Raises RunError if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if snapshot is None:  # a run that stopped before its first checkpoint begins again
            for file in ("events.jsonl", "summary.json"):
                (folder / file).unlink(missing_ok=True)
        else:
            set_aside_after(folder, snapshot.state.round)
        keep_copies((PluginFile(Path(one.file), one.sha256 or "") for one in config.plugins), folder)
        write_whole(folder / "config.yaml", dump(config))
        return EventLog(folder / "events.jsonl")
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error.strerror}); give another --out") from error


def put_adapter(adapters: AdapterState, model: Model, ranks: RankPolicy, folder: Path) -> None:
    """Write an adapter as a PEFT folder, whole or not at all."""
    with whole_folder(folder) as draft:
        lora = ranks.lora
        write_peft(adapters, model, ranks.scale, draft, lora.scaling == "rslora", lora.dropout)
        write_sums(draft)


def is_finished(folder: Path) -> bool:
    """Return True if the run in this folder has trained all its rounds."""
    return any(isinstance(event, RunDone) for event in settled(read_events(folder / "events.jsonl")))


def generate(folder: Path | str, prompt: str, *, max_new_tokens: int = 60, adapter: bool = True) -> str:
    """Continue a prompt with a run's model by greedy decoding; with `adapter` False, with the base model."""
    run = Run(Path(folder))
    with silence_transformers():
        model = open_model(run.config.model)
        tokenizer = model.tokenizer()
        whole = with_adapter(run.adapter_dir, model)
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        if not inputs["input_ids"].shape[1]:
            raise RunError("the prompt is empty; give some words to continue")
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, "repetition_penalty": 1.1}
        with contextlib.nullcontext() if adapter else whole.disable_adapter():
            tokens = whole.generate(**inputs, **options, pad_token_id=tokenizer.eos_token_id)
    continuation: str = tokenizer.decode(tokens[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return continuation


def export(folder: Path | str, to: Path | str, *, merged: bool = False) -> Path:
    """Copy a run's adapter as a PEFT folder, or write the base model with the adapter merged.

    Raises RunError if `to` exists and is not empty, or the run has no adapter yet.
    """
    run, to = Run(Path(folder)), Path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RunError(f"{to} exists already; choose another --to")
    if not (run.adapter_dir / "adapter_config.json").is_file():
        raise RunError(f"{run.folder} holds no adapter; it is written when a run has finished a round")
    if merged:
        with silence_transformers():
            return write_merged(run.adapter_dir, open_model(run.config.model), to)
    check_whole(run.adapter_dir)
    shutil.copytree(run.adapter_dir, to, dirs_exist_ok=True)
    return to


def _check_same(old: RunConfig, new: RunConfig, folder: Path) -> None:
    """Raise RunError unless they differ in the number of rounds alone, and the learning rate is constant.

    The places of model and text may differ too, where `check_inputs` compares the content, and the number of
    the server's processes, which changes rounding alone.
    """
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    for flat in (before, after):  # a plug-in is its content, wherever it lies; trackers only watch
        flat["plugins"] = [plugin["sha256"][:12] for plugin in flat["plugins"]]
        del flat["trackers"]
    may_differ = {"training.rounds", "devices.server_replicas", *moved_keys(folder)}
    if after["model.dtype"] == AUTO:  # each party of a deployed run has its own
        may_differ.add("model.dtype")
    changed = [key for key in after if before[key] != after[key] and key not in may_differ]
    if before["training.rounds"] != after["training.rounds"] and new.training.schedule != "constant":
        changed.append("training.rounds")
    if changed:
        listed = ", ".join(f"{key} (was {before[key]!r}, now {after[key]!r})" for key in changed[:4])
        raise RunError(f"{folder} was made with another configuration: {listed}; give another --out")


def _read_names(path: Path) -> dict[str, str]:
    """Return the folder of each client as noted in a file; none without one. Raises RunError for another."""
    if not path.is_file():
        return {}
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        if all(is_file_safe(folder) for folder in names.values()):
            return dict(names)
    except (ValueError, AttributeError):
        pass
    raise RunError(f"{path} does not say which client each folder belongs to; restore it, or remove it")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
