"""Methods side by side: the same configuration under each method and seed, each run in its own folder.

    FILE, methods, seeds --laid_out--> [Entry, ...] --compare--> trained runs --> compare.json, compare.html

    OUT/  compare.html  compare.json  runs/  splitft-seed0-1f0c9a27/  fedlora-seed0-8b63d5e1/  ...

A run's folder is named after its resolved configuration and our version, so a run that is finished is not
trained again, one that stopped goes on from its last round, and another configuration gets another folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from splitft.compare.report import (
    Trained,
    compared,
    comparison_body,
    refuse_different_data,
    server_reads,
)
from splitft.config import RunConfig, dump, load
from splitft.errors import ConfigError, MethodError, RunError, SplitftError
from splitft.evaluation.evaluate import HELD_OUT, EvaluationRequest, check_tasks, evaluate
from splitft.methods import METHODS, MethodName
from splitft.report.page import write_page
from splitft.run.folder import Run, is_finished
from splitft.run.train import train
from splitft.tracking.evaluations import METRICS, read_evaluations
from splitft.tracking.events import Event, RunStarted
from splitft.tracking.history import loss_history
from splitft.tracking.log import read_events, settled
from splitft.version import __version__


@dataclass(frozen=True)
class ComparisonRow:
    """One run of a comparison."""

    method: MethodName
    seed: int
    config: RunConfig
    folder: Path

    @property
    def name(self) -> str:
        """How progress and messages call it."""
        return f"{self.method}, seed {self.seed}"

    @property
    def finished(self) -> bool:
        """Whether it is trained already."""
        return (self.folder / "events.jsonl").is_file() and is_finished(self.folder)


Watch = Callable[[ComparisonRow, Event], None]
"""Told what happens in a run."""


def laid_out(
    file: Path, methods: Sequence[str], seeds: Sequence[int], out: Path, overrides: Sequence[str] = ()
) -> list[ComparisonRow]:
    """Every run of the comparison, seed by seed, each configuration checked; nothing is trained or written.

    Raises MethodError for a method that does not exist or cannot run as configured, and ConfigError.
    """
    known = list(METHODS)
    if not methods:
        raise MethodError(f"no methods to compare; give some of {', '.join(known)}")
    for name in methods:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; give some of {', '.join(known)}"
            raise MethodError(f"there is no method {name!r}{hint}")
    if len(set(methods)) < len(methods):
        raise MethodError(f"a method is named twice in {', '.join(methods)}; name each once")
    if not seeds:
        raise ConfigError(
            "the list of seeds is empty; give their number (--seeds 3), or a list (--seeds 0,7)"
        )
    load(file, overrides)  # faults of the file itself are said once, not once a method
    entries, faults = [], []
    for seed in seeds:
        for name in methods:
            try:
                config = load(file, [*overrides, f"method={name}", f"seed={seed}"])
            except ConfigError as error:
                faults += [f"{name}: {line}" for line in str(error).splitlines()]
                continue
            folder = out / "runs" / f"{name}-seed{seed}-{_digest(config)}"
            entries.append(ComparisonRow(config.method, seed, config, folder))
    if faults:
        raise MethodError("\n".join(dict.fromkeys(faults)))
    return entries


def compare(
    entries: Sequence[ComparisonRow],
    out: Path,
    *,
    target: float | None = None,
    tasks: Sequence[str] = (),
    watch: Watch = lambda entry, event: None,
    told: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Train what is not trained yet, write `compare.json` and `compare.html`, and return the comparison.

    With `tasks`, each run's model is tried on them too, on its held-out text, unless `eval.json` has it.
    Raises RunError if the runs had different text, and what `train` and `evaluate` raise, with the run's
    name.
    """
    check_tasks(tasks)
    runs = []
    for entry in entries:
        runs.append(_trained(entry, watch))
        refuse_different_data(runs)
    if tasks:
        metrics = [_tried(entry, tasks, told) for entry in entries]
        runs = [replace(run, metrics=one) for run, one in zip(runs, metrics, strict=True)]
    found = compared(runs, target)
    out.mkdir(parents=True, exist_ok=True)
    draft = out / "compare.json.draft"
    draft.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(draft, out / "compare.json")
    write_page(out / "compare.html", "Methods side by side", comparison_body(found, dump(entries[0].config)))
    return found


def _tried(
    entry: ComparisonRow, tasks: Sequence[str], told: Callable[[str, int, int], None]
) -> dict[str, float]:
    """What the run's model can do, measured now where `eval.json` does not have it."""
    if not Run(entry.folder).adapter_dir.is_dir():  # every client has its own, and there is no one model
        return {}
    kept = [one for one in read_evaluations(entry.folder) if one["adapter"] and one["data"] == HELD_OUT]
    missing = tuple(task for task in tasks if task not in {one["task"] for one in kept})
    if missing:
        try:
            kept += evaluate(
                entry.folder,
                EvaluationRequest(missing),
                lambda task, *count: told(f"{entry.name}, {task}", *count),
            )
        except SplitftError as error:
            raise type(error)(f"{entry.name}: {error}") from error
    return {
        key: value
        for one in kept
        if one["task"] in tasks
        for key, value in one["metrics"].items()
        if key in METRICS and key not in ("loss", "perplexity")
    }


def _trained(entry: ComparisonRow, watch: Watch) -> Trained:
    """A finished run, trained now if it has to be."""
    folder = entry.folder
    if not entry.finished:
        for draft in folder.glob("*.draft"):  # of a process that was killed before the run began
            if not (folder / "config.yaml").exists():
                draft.unlink()
        resume = (folder / "config.yaml").is_file()
        try:
            train(entry.config, folder, resume=resume, listeners=[lambda event: watch(entry, event)])
        except SplitftError as error:
            raise type(error)(f"{entry.name}: {error}") from error
    events = settled(read_events(folder / "events.jsonl"))
    summary = Run(folder).summary
    if not summary.get("finished"):
        raise RunError(f"{folder} did not finish; run the same command again to go on")
    started = next(event for event in events if isinstance(event, RunStarted))
    return Trained(
        method=entry.method,
        seed=entry.seed,
        folder=str(folder),
        summary=summary,
        course=loss_history(events),
        server_reads=server_reads(summary, started.received),
        about=f"{METHODS[entry.method].difference} {METHODS[entry.method].source}",
    )


def _digest(config: RunConfig) -> str:
    return hashlib.sha256(f"{__version__}\n{dump(config)}".encode()).hexdigest()[:8]
