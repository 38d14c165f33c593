"""Try a finished run's model on tasks, and keep what came out in its folder.

    run folder --held-out text, or --data PATH--> examples
               --base model + adapter (transformers, peft)--> tasks --> eval.json

`eval.json` has one entry for each task, text and model (with the adapter or without); the latest counts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from splitft.config import RunConfig, from_mapping
from splitft.data.corpora import read_records
from splitft.data.text import Example, held_out
from splitft.data.tokens import tokenise
from splitft.errors import ConfigError, RunError
from splitft.evaluation import TASKS, Reader, suitable_tasks
from splitft.evaluation.likelihood import windows
from splitft.export import with_adapter
from splitft.model import Model, open_model
from splitft.model.quiet import silence_transformers
from splitft.run.folder import Run
from splitft.run.inputs import divide_text
from splitft.tracking.evaluations import read_evaluations

HELD_OUT = "held out by the run"
"""How `eval.json` calls the run's own held-out text."""

Told = Callable[[str, int, int], None]
"""Told of progress: the task, and how many of how many examples are done."""


@dataclass(frozen=True)
class EvaluationRequest:
    """What to try a model on, and how."""

    tasks: tuple[str, ...] = ()
    """Names of tasks; none for those that suit the text."""
    data: str | None = None
    """A file or hub data set instead of the run's own held-out text."""
    overrides: tuple[str, ...] = ()
    """`data.key=value`, such as data.max_examples=200."""
    adapter: bool = True
    """With the run's adapter; without it, the base model for comparison."""
    batch_size: int = 16
    """Prompts continued at once."""
    max_new_tokens: int | None = None
    """Longest continuation; None for the task's own."""
    client: str | None = None
    """Try this client's own adapter, of a run that leaves clients some blocks or all, on what it held out."""


def evaluate(
    folder: Path | str, trial: EvaluationRequest | None = None, told: Told = lambda task, done, total: None
) -> list[dict[str, Any]]:
    """Try the run's model, write `eval.json`, and return this trial's entries.

    Raises RunError if there is no adapter or a task does not suit, and what reading the text raises.
    """
    run, trial = Run(Path(folder)), trial or EvaluationRequest()
    check_tasks(trial.tasks)
    config = _configured(run.config, trial)
    rounds = run.summary["rounds"]
    with silence_transformers():
        model = open_model(config.model)
        tokenizer = model.tokenizer()
        adapter = _adapter_of(run, trial)
        texts = _Texts(config, model, trial.data is not None, trial.client)
        tasks = trial.tasks or suitable_tasks(texts.examples(), tokenizer)
        readings = {task: texts.windows() if task == "windows" else texts.examples() for task in tasks}
        whole = with_adapter(adapter, model.path, model.dtype)
        entries = []
        for task, examples in readings.items():
            began = time.monotonic()
            reader = Reader(
                whole,
                tokenizer,
                examples,
                model.shape.max_positions,
                trial.batch_size,
                trial.max_new_tokens,
                lambda done, total, task=task: told(task, done, total),  # type: ignore[misc]
            )
            with nullcontext() if trial.adapter else whole.disable_adapter():
                outcome = TASKS[task](reader)
            entries.append(
                {
                    "task": task,
                    "data": trial.data
                    or (HELD_OUT if trial.client is None else f"held out by {trial.client}"),
                    "client": trial.client,
                    "adapter": trial.adapter,
                    "rounds": rounds,
                    "metrics": outcome.metrics,
                    "settings": {
                        "overrides": list(trial.overrides),
                        "max_new_tokens": trial.max_new_tokens,
                        "max_tokens": config.data.max_tokens,
                        "dtype": config.model.dtype,
                    },
                    "seconds": round(time.monotonic() - began, 1),
                    "samples": list(outcome.samples),
                }
            )
    _keep(run.folder, entries)
    return entries


def _adapter_of(run: Run, trial: EvaluationRequest) -> Path:
    """The global adapter, or a client's own. Raises RunError if it is not there."""
    personal = run.folder / "personal"
    names = sorted(path.name for path in personal.iterdir()) if personal.is_dir() else []
    if trial.client is not None and trial.client not in names:
        held = f"there are those of {', '.join(names)}" if names else "all clients share the global one"
        raise RunError(f"{run.folder} has no adapter of {trial.client!r} alone; {held}")
    if trial.client is not None:
        return personal / trial.client
    if names and not run.adapter_dir.is_dir():
        raise RunError(
            f"{run.folder} has no global adapter, but one of each client: give --client, such as {names[0]}"
        )
    return run.adapter_dir


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise RunError, with the nearest name, for a task that does not exist."""
    for task in tasks:
        if task not in TASKS:
            near = get_close_matches(task, TASKS, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; give one of {', '.join(TASKS)}"
            raise RunError(f"there is no task {task!r}{hint}")


class _Texts:
    """The text of a trial, read when it is first needed."""

    def __init__(self, config: RunConfig, model: Model, other: bool, client: str | None) -> None:
        self._config, self._model, self._other, self._client = config, model, other, client
        self._examples: tuple[Example, ...] | None = None

    def examples(self) -> tuple[Example, ...]:
        """The run's held-out examples as it evaluates on them, or all of the other text."""
        if self._examples is None:
            self._examples = self._all() if self._other else self._held_out()
        return self._examples

    def windows(self) -> tuple[Example, ...]:
        """The other text as one, in windows of `data.max_tokens`."""
        if not self._other:
            raise RunError("the task windows is for one long text: give it with --data")
        data = self._config.data
        text = "\n\n".join(record.text for record in read_records(data, None, self._config.seed))
        ids = self._model.tokenizer()([text], add_special_tokens=False, verbose=False)["input_ids"][0]
        if len(ids) < 2:
            raise RunError(f"{data.source} has {len(ids)} token(s); a window needs two")
        return tuple(windows(ids, min(data.max_tokens, self._model.shape.max_positions)))

    def _all(self) -> tuple[Example, ...]:
        data = self._config.data
        records = read_records(data, None, self._config.seed)
        return tokenise(records, self._model.tokenizer(), data.max_tokens, data.separator).examples

    def _held_out(self) -> tuple[Example, ...]:
        data, seed = self._config.data, self._config.seed
        divided = divide_text(self._config, self._model)
        found: list[Example] = []
        for index, (name, part) in enumerate(zip(divided.names, divided.parts, strict=True)):
            if self._client not in (None, name):
                continue
            own = [divided.text.examples[place] for place in part]
            found += held_out(own, data.holdout, seed, index)[1][: data.eval_examples]
        return tuple(found)


def _configured(config: RunConfig, trial: EvaluationRequest) -> RunConfig:
    """The run's configuration with another text, where the trial names one."""
    other = [one for one in trial.overrides if not one.strip().startswith("data.")]
    if other:
        raise ConfigError(
            f"{other[0]!r}: only keys of the section data can be given to eval, as data.key=value"
        )
    tree = config.model_dump(mode="json")
    if trial.data is None:
        moved = [one for one in trial.overrides if one.partition("=")[0].strip() != "data.eval_examples"]
        if moved:
            raise ConfigError(
                f"{moved[0]!r} would change which text is held out, so that some of it was trained on; "
                f"without --data only data.eval_examples can be given"
            )
        return from_mapping(tree, trial.overrides)
    tree["data"] |= {"source": trial.data, "hub_config": None, "max_examples": None}
    if Path(trial.data).suffix == ".txt":
        tree["data"] |= {"text": "text", "prompt": None, "completion": None}
    return from_mapping(tree, trial.overrides)


def _keep(folder: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Put the entries in place of older ones of the same task, text and model, in one stroke."""
    key = ("task", "data", "adapter", "client")
    fresh = {tuple(entry[name] for name in key) for entry in entries}
    kept = [
        entry for entry in read_evaluations(folder) if tuple(entry.get(name) for name in key) not in fresh
    ]
    draft = folder / "eval.json.draft"
    draft.write_text(json.dumps({"evaluations": [*kept, *entries]}, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, folder / "eval.json")


def source_is_trained_on(folder: Path | str, trial: EvaluationRequest) -> bool:
    """Whether the other text is the file that the run trained on."""
    if trial.data is None:
        return False
    own, other = (Path(path).expanduser() for path in (Run(Path(folder)).config.data.source, trial.data))
    return own == other or (own.is_file() and other.is_file() and own.samefile(other))
