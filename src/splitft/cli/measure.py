"""Verbs that measure text, runs and methods: shares, eval, compare."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitft.cli.app import INTERRUPTED, AsJson, ConfigFile, RunFolder, console, end, verb
from splitft.errors import ConfigError

if TYPE_CHECKING:
    from splitft.cli.counting import Counting
    from splitft.compare.compare import ComparisonRow
    from splitft.tracking.events import Event

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as clients.shares.alpha=0.1")
]


@verb
def shares(
    file: ConfigFile,
    overrides: Overrides = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with plots to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show who gets which text: examples, tokens, lengths and labels of each client; trains nothing."""
    from splitft.config import load
    from splitft.report import shares as showing
    from splitft.report.page import write_page
    from splitft.run.inputs import shares as shared

    told = shared(load(file, overrides or [])).to_json()
    if html is not None:
        write_page(html, "Who gets which text", showing.shares_body(told))
    if as_json:
        typer.echo(json.dumps(told, indent=2))
        return
    screen = console()
    screen.print(showing.how_divided(told), highlight=False, markup=False, soft_wrap=True)
    screen.print()
    screen.print(showing.share_table(told))
    if (labels := showing.label_table(told)) is not None:
        screen.print()
        screen.print(labels)
    screen.print()
    for sentence in showing.how_unequal(told):
        screen.print(sentence, highlight=False, markup=False, soft_wrap=True)
    if html is not None:
        screen.print(f"Plots    {html}", highlight=False, markup=False, soft_wrap=True)


@verb
def eval(
    folder: RunFolder,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[data.KEY=VALUE]...", help="Such as data.max_examples=200")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="perplexity, windows, e2e or gsm8k, or several with commas [default: what suits]"),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="File or hub data set [default: the text that the run held out]")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Without the adapter, for comparison.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts continued at once.")] = 16,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest continuation, in tokens [default: the task's]")
    ] = None,
    client: Annotated[
        str | None, typer.Option(help="Try this client's own adapter, where clients keep blocks.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what a run's model can do: perplexity, BLEU, ROUGE-L and chrF, or exact match."""
    from splitft.cli.counting import Counting
    from splitft.evaluation.evaluate import EvaluationRequest, evaluate, source_is_trained_on
    from splitft.tracking.evaluations import evaluation_table, sample_lines

    tasks = tuple(name.strip() for name in task.split(",")) if task is not None else ()
    trial = EvaluationRequest(
        tasks, data, tuple(overrides or ()), not base, batch_size, max_new_tokens, client
    )
    if source_is_trained_on(folder, trial):
        typer.echo(f"splitft: note: the run trained on text of {data}; leave --data out to be fair", err=True)
    with Counting(console(stderr=True)) as counting:
        entries = evaluate(folder, trial, counting)
    if as_json:
        typer.echo(json.dumps(entries, indent=2))
        return
    screen = console()
    screen.print(evaluation_table(entries))
    for line in sample_lines(entries):
        screen.print(line, highlight=False, markup=False)
    screen.print(f"Kept in  {folder / 'eval.json'}", highlight=False, markup=False, soft_wrap=True)


@verb
def compare(
    file: ConfigFile,
    overrides: Overrides = None,
    methods: Annotated[str, typer.Option(help="Names with commas between, or all.")] = "splitft,fedlora",
    seeds: Annotated[str, typer.Option(help="How many (3), or which (0,1,2).")] = "1",
    out: Annotated[Path | None, typer.Option(help="Folder of all runs [default: runs/compare-NAME]")] = None,
    target: Annotated[
        float | None, typer.Option(help="Held-out loss to reach [default: the lowest that all reach]")
    ] = None,
    tasks: Annotated[str, typer.Option(help="Also try every model: e2e or gsm8k, with commas between.")] = "",
    as_json: AsJson = False,
) -> None:
    """Train the field's methods on the same text and seeds, and set them side by side.

    Runs that are finished in --out already are not trained again; after Ctrl-C, the same command goes on.
    """
    from splitft.cli.counting import Counting
    from splitft.compare import compare as comparing
    from splitft.compare.report import NOTE, comparison_table, metric_table, target_sentence
    from splitft.methods import METHODS

    out = out or Path("runs") / f"compare-{file.stem}"
    names = list(METHODS) if methods.strip() == "all" else _listed(methods)
    entries = comparing.laid_out(file, names, _seeds(seeds), out, overrides or [])
    screen = console(stderr=as_json)
    try:
        with Counting(screen) as counting:
            watch = _Watching(entries, counting)
            told = comparing.compare(
                entries, out, target=target, tasks=_listed(tasks), watch=watch, told=counting
            )
    except KeyboardInterrupt:
        done = sum(entry.finished for entry in entries)
        command = (
            shlex.join(["splitft", *sys.argv[1:]]) if sys.argv[1:2] == ["compare"] else "the same command"
        )
        end(
            f"stopped; {done} of {len(entries)} runs are done and safe in {out}. Go on with: {command}",
            INTERRUPTED,
        )
    if as_json:
        typer.echo(json.dumps(told, indent=2))
        return
    screen.print()
    screen.print(comparison_table(told))
    if (metrics := metric_table(told)) is not None:
        screen.print()
        screen.print(metrics)
    screen.print(f"\n{target_sentence(told)} {NOTE}", highlight=False, markup=False)
    screen.print(f"Report   {out / 'compare.html'}", highlight=False, markup=False, soft_wrap=True)


class _Watching:
    """Shows each run as a bar of its steps, and how many runs are left."""

    def __init__(self, entries: Sequence[ComparisonRow], counting: Counting) -> None:
        self._entries, self._counting = list(entries), counting
        self._steps = 0
        cached = sum(entry.finished for entry in entries)
        if cached:
            counting.say(f"{cached} of {len(entries)} runs are there already")

    def __call__(self, entry: ComparisonRow, event: Event) -> None:
        from splitft.tracking.events import Evaluated, RunDone, RunResumed, RunStarted, StepDone, Warned

        training = entry.config.training
        name = f"{self._entries.index(entry) + 1}/{len(self._entries)} {entry.name}"
        clients = max(1, round(training.participation * entry.config.clients.count))
        total = training.rounds * training.steps * clients
        match event:
            case RunStarted():
                self._steps = 0
                self._counting(name, 0, total)
            case RunResumed():
                self._steps = (event.round - 1) * training.steps * clients
                self._counting(name, self._steps, total)
            case StepDone():
                self._steps += 1
                self._counting(name, min(self._steps, total), total)
            case Evaluated() if event.round == training.rounds:
                left = sum(not other.finished for other in self._entries) - 1
                self._counting.say(
                    f"{name}: held-out loss {event.loss:.3f} after round {event.round}; "
                    f"{left} run{'' if left == 1 else 's'} left"
                )
            case Warned():
                self._counting.say(f"{name}: warning: {event.message}")
            case RunDone():
                self._counting.drop(name)
            case _:
                pass


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _seeds(text: str) -> list[int]:
    """The seeds of `3` (0, 1, 2) or of `0,7` (these); a trailing comma makes a list of one."""
    parts = _listed(text)
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--seeds {text!r}: give how many, such as 3, or which, such as 0,1,2")
    if "," not in text:
        return list(range(int(parts[0]))) if parts else []
    return list(dict.fromkeys(int(part) for part in parts))
