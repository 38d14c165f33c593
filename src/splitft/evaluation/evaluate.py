"""Evaluate a finished run's model on tasks, and keep the metrics in its folder.

    run folder --held-out text, or --data PATH--> examples
               --base model + adapter (transformers, peft)--> tasks --> eval.json

`eval.json` has one entry for each task, text and model (with the adapter or without); a newer one replaces
it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from splitft.config import RunConfig, from_mapping
from splitft.data.corpora import read_records
from splitft.data.holdout import evaluation_part, held_out
from splitft.data.text import Example
from splitft.data.tokens import tokenise
from splitft.errors import ConfigError, RunError
from splitft.evaluation.likelihood import windows
from splitft.evaluation.tasks import TASKS, TaskInput, suitable_tasks
from splitft.files import write_whole
from splitft.model import Model, open_model
from splitft.model.source import silence_transformers
from splitft.peft_folder import with_adapter
from splitft.run.folder import Run
from splitft.run.inputs import divide_text
from splitft.tracking.evaluations import read_evaluations

HELD_OUT = "held out by the run"
"""Name of the run's own held-out text in `eval.json`."""

Progress = Callable[[str, int, int], None]
"""Gets the task, the number of examples done, and the number of all."""


@dataclass(frozen=True)
class EvaluationRequest:
    """Tasks, text and model of an evaluation."""

    tasks: tuple[str, ...] = ()
    """Names of tasks; empty for those that suit the text."""
    data: str | None = None
    """A file or hub data set instead of the run's own held-out text."""
    overrides: tuple[str, ...] = ()
    """`data.key=value`, such as data.max_examples=200."""
    adapter: bool = True
    """Use the run's adapter; without it, evaluate the base model for comparison."""
    batch_size: int = 16
    """Prompts continued at once."""
    max_new_tokens: int | None = None
    """Longest continuation; None for the task's own."""
    client: str | None = None
    """Evaluate this client's own adapter, where clients have one, on what it held out."""

    @property
    def source(self) -> str:
        """Name of the text in `eval.json`."""
        return self.data or (HELD_OUT if self.client is None else f"held out by {self.client}")


def evaluate(
    folder: Path | str,
    request: EvaluationRequest | None = None,
    progress: Progress = lambda task, done, total: None,
) -> list[dict[str, Any]]:
    """Evaluate the run's model, write `eval.json`, and return the new entries.

    Raises RunError if there is no adapter or a task does not suit, and the errors of reading the text.
    """
    run, request = Run(Path(folder)), request or EvaluationRequest()
    check_tasks(request.tasks)
    config = _with_text(run.config, request)
    rounds = run.summary["rounds"]
    with silence_transformers():
        # the model, its adapter, and the text of each task
        model = open_model(config.model)
        tokenizer = model.tokenizer()
        adapter = _adapter_folder(run, request)
        text = _TaskText(config, model, request)
        tasks = request.tasks or suitable_tasks(text.examples, tokenizer)
        texts = {task: text.windows if TASKS[task].windows else text.examples for task in tasks}
        whole = with_adapter(adapter, model)
        # one entry for each task
        entries = []
        for task, examples in texts.items():
            began = time.monotonic()
            task_input = TaskInput(
                whole,
                tokenizer,
                examples,
                model.shape.max_positions,
                request.batch_size,
                request.max_new_tokens,
                partial(progress, task),
            )
            with nullcontext() if request.adapter else whole.disable_adapter():
                result = TASKS[task].run(task_input)
            entries.append(
                {
                    "task": task,
                    "data": request.source,
                    "client": request.client,
                    "adapter": request.adapter,
                    "rounds": rounds,
                    "metrics": result.metrics,
                    "settings": {
                        "overrides": list(request.overrides),
                        "max_new_tokens": request.max_new_tokens,
                        "max_tokens": config.data.max_tokens,
                        "dtype": model.spec.dtype,
                    },
                    "seconds": round(time.monotonic() - began, 1),
                    "samples": list(result.samples),
                }
            )
    _write_entries(run.folder, entries)
    return entries


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise RunError, with the nearest name, for a task that does not exist."""
    for task in tasks:
        if task not in TASKS:
            near = get_close_matches(task, TASKS, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; give one of {', '.join(TASKS)}"
            raise RunError(f"there is no task {task!r}{hint}")


def _adapter_folder(run: Run, request: EvaluationRequest) -> Path:
    """Return the folder of the global adapter, or of a client's own. Raises RunError if there is none."""
    personal = run.personal
    names = sorted(personal)
    if request.client is not None and request.client not in names:
        held = f"there are those of {', '.join(names)}" if names else "all clients share the global one"
        raise RunError(f"{run.folder} has no adapter of {request.client!r} alone; {held}")
    if request.client is not None:
        return personal[request.client]
    if names and not run.adapter_dir.is_dir():
        raise RunError(
            f"{run.folder} has no global adapter, but one of each client: give --client, such as {names[0]}"
        )
    return run.adapter_dir


class _TaskText:
    """Text of an evaluation, read when it is first needed."""

    def __init__(self, config: RunConfig, model: Model, request: EvaluationRequest) -> None:
        self._config, self._model, self._request = config, model, request

    @cached_property
    def examples(self) -> tuple[Example, ...]:
        """The run's held-out examples as it evaluates on them, or all of another text."""
        data, seed = self._config.data, self._config.seed
        if self._request.data is not None:
            records = read_records(data, None, seed)
            return tokenise(records, self._model.tokenizer(), data.max_tokens, data.separator).examples
        divided = divide_text(self._config, self._model)
        found: list[Example] = []
        for index, (name, part) in enumerate(zip(divided.names, divided.parts, strict=True)):
            if self._request.client in (None, name):
                own = [divided.text.examples[place] for place in part]
                held = held_out(own, data.holdout, seed, index)[1]
                found += evaluation_part(held, data.eval_part, data.eval_examples)
        return tuple(found)

    @cached_property
    def windows(self) -> tuple[Example, ...]:
        """All of another text, in windows of `data.max_tokens`."""
        if self._request.data is None:
            raise RunError("the task windows is for one long text: give it with --data")
        data = self._config.data
        text = "\n\n".join(record.text for record in read_records(data, None, self._config.seed))
        ids = self._model.tokenizer()([text], add_special_tokens=False, verbose=False)["input_ids"][0]
        if len(ids) < 2:
            raise RunError(f"{data.source} has {len(ids)} token(s); a window needs two")
        return tuple(windows(ids, min(data.max_tokens, self._model.shape.max_positions)))


def _with_text(config: RunConfig, request: EvaluationRequest) -> RunConfig:
    """Return the run's configuration with another text, if the request names one."""
    other = [one for one in request.overrides if not one.strip().startswith("data.")]
    if other:
        raise ConfigError(
            f"{other[0]!r}: only keys of the section data can be given to eval, as data.key=value"
        )
    tree = config.model_dump(mode="json")
    if request.data is None:
        moved = [one for one in request.overrides if one.partition("=")[0].strip() != "data.eval_examples"]
        if moved:
            raise ConfigError(
                f"{moved[0]!r} would change which text is held out, so that some of it was trained on; "
                f"without --data only data.eval_examples can be given"
            )
        return from_mapping(tree, request.overrides)
    tree["data"] |= {"source": request.data, "hub_config": None, "max_examples": None}
    if Path(request.data).suffix == ".txt":
        tree["data"] |= {"text": "text", "prompt": None, "completion": None}
    return from_mapping(tree, request.overrides)


def _write_entries(folder: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Add the entries to `eval.json`; they replace older ones of the same task, text and model."""
    key = ("task", "data", "adapter", "client")
    fresh = {tuple(entry[name] for name in key) for entry in entries}
    kept = [one for one in read_evaluations(folder) if tuple(one.get(name) for name in key) not in fresh]
    write_whole(folder / "eval.json", json.dumps({"evaluations": [*kept, *entries]}, indent=2) + "\n")


def source_is_trained_on(folder: Path | str, request: EvaluationRequest) -> bool:
    """Return whether the other text is the file that the run trained on."""
    if request.data is None:
        return False
    own, other = (Path(path).expanduser() for path in (Run(Path(folder)).config.data.source, request.data))
    return own == other or (own.is_file() and other.is_file() and own.samefile(other))
