"""Train one configuration under several methods and seeds, each run in its own folder, and compare them.

FILE, methods, seeds --plan_runs--> [ComparisonRow, ...] --compare--> compare.json, compare.html
              └--tune_methods--> values of each method ---^

OUT/  compare.html  compare.json  runs/  splitft-seed0-1f0c9a27/  fedlora-seed0-8b63d5e1/  ...
                                  tuning/  splitft-seed0-77ab01c2/  ...
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from splitft.compare.budget import Budget, train_within
from splitft.compare.comparison import Trained, compare_runs, refuse_different_data, server_reads
from splitft.compare.comparison_page import comparison_page
from splitft.compare.rows import ComparisonRow, RowListener, plan_row
from splitft.compare.tuning import FINAL_PART, Candidate, TunedValues, choose, parse_grid, plan_candidates
from splitft.config import dump, load
from splitft.errors import ConfigError, MethodError, RunError, SplitftError
from splitft.evaluation.evaluate import HELD_OUT, EvaluationRequest, check_tasks, evaluate
from splitft.files import write_whole
from splitft.methods import METHODS
from splitft.report.page import write_page
from splitft.run.folder import Run
from splitft.tracking.evaluations import METRICS, read_evaluations
from splitft.tracking.events import RunStarted
from splitft.tracking.log import read_events, settled

EvaluationProgress = Callable[[str, int, int], None]
"""Receives the name of an evaluation, the number of examples done, and of all."""


def plan_tuning(
    file: Path, methods: Sequence[str], seed: int, out: Path, overrides: Sequence[str], tune: Sequence[str]
) -> dict[str, list[Candidate]]:
    """Return the candidates of every method, for `tune` such as `training.lr=1e-4,1e-3`; write nothing.

    Raises MethodError and ConfigError.
    """
    load(file, overrides)
    grid, found, faults = parse_grid(tune), dict[str, list[Candidate]](), list[str]()
    for name in method_names(methods):
        try:
            found[name] = plan_candidates(file, name, seed, out, overrides, grid)
        except ConfigError as error:
            faults += [f"{name}: {line}" for line in str(error).splitlines()]
    if faults:
        raise MethodError("\n".join(dict.fromkeys(faults)))
    return found


def tune_methods(
    candidates: Mapping[str, Sequence[Candidate]], budget: Budget, listener: RowListener
) -> dict[str, TunedValues]:
    """Train the candidates of every method as far as needed; return what is chosen for each."""
    return {name: choose(tried, budget, listener) for name, tried in candidates.items()}


def plan_runs(
    file: Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    overrides: Sequence[str] = (),
    choices: Mapping[str, TunedValues] | None = None,
) -> list[ComparisonRow]:
    """Return every run of the comparison, seed by seed, with its configuration checked; write nothing.

    `methods` are names, or `all` alone; with `choices`, each has its chosen values, and is evaluated on
    the first half of the held-out text. Raises MethodError for a method that does not exist or cannot run as
    configured, and ConfigError.
    """
    load(file, overrides)  # report the file's own faults once, not once for each method; load its plug-ins
    methods = method_names(methods)
    if not seeds:
        raise ConfigError(
            "the list of seeds is empty; give their number (--seeds 3), or a list (--seeds 0,7)"
        )
    rows, faults = [], []
    for seed in seeds:
        for name in methods:
            chosen = [*choices[name].overrides, FINAL_PART] if choices else []
            try:
                rows.append(plan_row(file, name, seed, out / "runs", [*overrides, *chosen]))
            except ConfigError as error:
                faults += [f"{name}: {line}" for line in str(error).splitlines()]
    if faults:
        raise MethodError("\n".join(dict.fromkeys(faults)))
    return rows


def method_names(methods: Sequence[str]) -> list[str]:
    """Return the methods, all of them for `all`. Raises MethodError unless each exists and is named once."""
    methods = list(METHODS) if list(methods) == ["all"] else list(methods)
    _check_methods(methods)
    return methods


def _check_methods(methods: Sequence[str]) -> None:
    """Raise MethodError unless there are methods, all of them known, and each named once."""
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


@dataclass(frozen=True)
class ComparisonOptions:
    """Options of a comparison: its target, tasks, and the values of each method."""

    target: float | None = None
    """Held-out loss to reach; None for the lowest that all runs reach."""
    tasks: Sequence[str] = ()
    """Tasks that each run's model is evaluated on."""
    choices: Mapping[str, TunedValues] = field(default_factory=dict)
    """Values that were chosen for each method."""


def compare(
    rows: Sequence[ComparisonRow],
    out: Path,
    options: ComparisonOptions | None = None,
    *,
    listener: RowListener = lambda row, event: None,
    progress: EvaluationProgress = lambda name, done, total: None,
) -> dict[str, Any]:
    """Train the runs that are not finished, write `compare.json` and `compare.html`; return the comparison.

    With tasks, each run's model is evaluated on its held-out text, unless `eval.json` has the result.
    Raises RunError if the runs had different text, and the errors of `train` and `evaluate`, with the run's
    name.
    """
    options = options or ComparisonOptions()
    tasks = options.tasks
    check_tasks(tasks)
    runs: list[Trained] = []
    for row in rows:
        runs.append(_trained(row, listener))
        refuse_different_data(runs)
    if tasks:
        metrics = [_task_metrics(row, tasks, progress) for row in rows]
        runs = [replace(run, metrics=one) for run, one in zip(runs, metrics, strict=True)]
    data = compare_runs(runs, options.target)
    data["tuning"] = [choice.as_data() for choice in options.choices.values()]
    write_whole(out / "compare.json", json.dumps(data, indent=2, allow_nan=False) + "\n")
    write_page(out / "compare.html", comparison_page(data, dump(rows[0].config)))
    return data


def _task_metrics(row: ComparisonRow, tasks: Sequence[str], progress: EvaluationProgress) -> dict[str, float]:
    """Return the metrics of the run's model; measure those that `eval.json` does not have."""
    if not Run(row.folder).adapter_dir.is_dir():  # every client has its own model, and there is no global one
        return {}
    entries = [one for one in read_evaluations(row.folder) if one["adapter"] and one["data"] == HELD_OUT]
    missing = tuple(task for task in tasks if task not in {one["task"] for one in entries})
    if missing:
        try:
            entries += evaluate(
                row.folder,
                EvaluationRequest(missing),
                lambda task, *count: progress(f"{row.name}, {task}", *count),
            )
        except SplitftError as error:
            raise type(error)(f"{row.name}: {error}") from error
    return {
        key: value
        for one in entries
        if one["task"] in tasks
        for key, value in one["metrics"].items()
        if key in METRICS and key not in ("loss", "perplexity")
    }


def _trained(row: ComparisonRow, listener: RowListener) -> Trained:
    """Return a run that is trained as far as it is needed; train it first, or continue it."""
    folder = row.folder
    try:
        history = train_within(row.config, folder, row.budget, [lambda event: listener(row, event)])
    except SplitftError as error:
        raise type(error)(f"{row.name}: {error}") from error
    if not row.finished:
        raise RunError(f"{folder} did not finish; run the same command again to continue")
    events = settled(read_events(folder / "events.jsonl"))
    summary = Run(folder).summary
    started = next(event for event in events if isinstance(event, RunStarted))
    return Trained(
        method=row.method,
        seed=row.seed,
        folder=str(folder),
        summary=summary,
        history=history,
        server_reads=server_reads(summary, started.received),
        about=f"{METHODS[row.method].difference} {METHODS[row.method].source}",
    )
