"""A run's folder: what is in it, how it is opened, and when a run in it may continue.

config.yaml  events.jsonl  summary.json  checkpoints/  adapter/  report.html
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from splitft.adapters import AdapterState
from splitft.config import RunConfig, dump, load
from splitft.errors import RunError
from splitft.export import write_peft
from splitft.model import Model
from splitft.tracking.events import RunDone
from splitft.tracking.log import EventLog, read_events, settled
from splitft.training.checkpoint import Snapshot, latest, load_snapshot
from splitft.training.ranks import RankPolicy


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
        from splitft.report.page import write_report

        return write_report([self.folder], self.folder / "report.html")

    def _existing(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise RunError(f"{self.folder} is not a run folder: it has no {name}")
        return path


def find_snapshot(folder: Path, config: RunConfig, resume: bool) -> Snapshot | None:
    """Where the run that is there can continue; None for a fresh start. Changes nothing.

    Raises RunError if the folder cannot be used as asked.
    """
    written = folder / "config.yaml"
    if resume:
        if not written.is_file():
            raise RunError(
                f"{folder} holds no run to resume (no config.yaml); leave --resume out to start one"
            )
        _check_same(load(written), config, folder)
        number = latest(folder)
        return None if number is None else load_snapshot(folder, number)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "holds a run already" if written.is_file() else "exists and is not empty"
        raise RunError(f"{folder} {what}; continue it with --resume, or give another --out")
    return None


def open_log(folder: Path, config: RunConfig, snapshot: Snapshot | None) -> EventLog:
    """Make the run folder, or take it up again, and open its log.

    Raises RunError if that cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if snapshot is None:  # of a run that stopped before a round was saved, nothing counts
            for file in ("events.jsonl", "summary.json"):
                (folder / file).unlink(missing_ok=True)
        draft = folder / "config.yaml.draft"
        draft.write_text(dump(config), encoding="utf-8")
        os.replace(draft, folder / "config.yaml")
        return EventLog(folder / "events.jsonl")
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error.strerror}); give another --out") from error


def put_adapter(adapters: AdapterState, model: Model, ranks: RankPolicy, folder: Path) -> None:
    """Write an adapter as a PEFT folder, put in place when it is whole."""
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    write_peft(adapters, model, ranks.scale, draft, ranks.lora.scaling == "rslora")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(draft, folder)


def _check_same(old: RunConfig, new: RunConfig, folder: Path) -> None:
    """Only more rounds may be asked of a run that is resumed, unless its learning rate falls over them."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    changed = [key for key in after if before[key] != after[key] and key != "training.rounds"]
    if before["training.rounds"] != after["training.rounds"] and new.training.schedule != "constant":
        changed.append("training.rounds")
    if changed:
        listed = ", ".join(f"{key} (was {before[key]!r}, now {after[key]!r})" for key in changed[:4])
        raise RunError(f"{folder} was made with another configuration: {listed}; give another --out")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def is_finished(folder: Path) -> bool:
    """Whether the run in this folder has trained all its rounds."""
    return any(isinstance(event, RunDone) for event in settled(read_events(folder / "events.jsonl")))
