"""Verbs that measure text, runs and methods: shares, eval, compare."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitft.cli.app import INTERRUPTED, AsJson, ConfigFile, RunFolder, console, end, say, verb
from splitft.errors import ConfigError

if TYPE_CHECKING:
    from splitft.cli.progress import ProgressBars
    from splitft.compare.rows import ComparisonRow
    from splitft.tracking.events import Event

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as clients.shares.alpha=0.1")
]


@verb
def shares(
    file: ConfigFile,
    overrides: Overrides = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with charts to this file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the examples, tokens, lengths and labels of each client, without training."""
    from splitft.config import load
    from splitft.report import share_charts as charts
    from splitft.report.page import write_page
    from splitft.run.inputs import shares as divide

    data = divide(load(file, overrides or [])).to_json()
    if html is not None:
        write_page(html, charts.shares_page(data))
    if as_json:
        typer.echo(json.dumps(data, indent=2))
        return
    screen = console()
    say(screen, charts.division_sentence(data), "")
    screen.print(charts.share_table(data).to_rich())
    if (labels := charts.label_table(data)) is not None:
        screen.print()
        screen.print(labels.to_rich())
    say(screen, "", *charts.distance_sentences(data))
    if html is not None:
        say(screen, f"Charts   {html}")


@verb
def eval(
    folder: RunFolder,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[data.KEY=VALUE]...", help="Such as data.max_examples=200")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="perplexity, windows, e2e, gsm8k, or several, separated by commas.",
            show_default="what fits the text",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="File or data set of the hub.", show_default="the text that the run held out"),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Use the base model without the adapter.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts in a batch.")] = 16,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum length, in tokens.", show_default="the task's")
    ] = None,
    client: Annotated[
        str | None, typer.Option(help="Evaluate this client's own adapter, where clients keep blocks.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a run's model: perplexity, BLEU, ROUGE-L and chrF, or exact match."""
    from splitft.cli.progress import ProgressBars
    from splitft.evaluation.evaluate import EvaluationRequest, evaluate, source_is_trained_on
    from splitft.tracking.evaluations import evaluation_table, sample_lines

    tasks = tuple(name.strip() for name in task.split(",")) if task is not None else ()
    request = EvaluationRequest(
        tasks, data, tuple(overrides or ()), not base, batch_size, max_new_tokens, client
    )
    if source_is_trained_on(folder, request):
        typer.echo(
            f"splitft: note: the run trained on text of {data}; omit --data to use held-out text", err=True
        )
    with ProgressBars(console(stderr=True)) as bars:
        entries = evaluate(folder, request, bars)
    if as_json:
        typer.echo(json.dumps(entries, indent=2))
        return
    screen = console()
    screen.print(evaluation_table(entries, short=True).to_rich())
    for line in sample_lines(entries):
        screen.print(line, highlight=False, markup=False)
    say(screen, f"Saved in {folder / 'eval.json'}")


@verb
def compare(
    file: ConfigFile,
    overrides: Overrides = None,
    methods: Annotated[str, typer.Option(help="Names, separated by commas, or all.")] = "splitft,fedlora",
    seeds: Annotated[str, typer.Option(help="Their number (3), or a list (0,1,2).")] = "1",
    out: Annotated[
        Path | None, typer.Option(help="Folder of all runs.", show_default="runs/compare-NAME")
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(help="Held-out loss to reach.", show_default="the lowest that all runs reach"),
    ] = None,
    tasks: Annotated[str, typer.Option(help="Evaluate every model on e2e, gsm8k, or both.")] = "",
    tune: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=A,B,...",
            help="Let every method choose the best of these values, on held-out text that the figures do not "
            "use, with the first seed; several times for several keys.",
        ),
    ] = None,
    until_seconds: Annotated[
        float | None, typer.Option(help="Compare all after this time on the simulated clock.")
    ] = None,
    until_examples: Annotated[
        int | None, typer.Option(help="Compare all after this many examples of all clients.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train several methods on the same text and seeds, and compare them.

    Runs that are finished in --out are not trained again; after Ctrl-C, the same command continues.
    With --tune training.lr=3e-4,1e-3,3e-3 every method has its own best learning rate.
    """
    from splitft.cli.progress import ProgressBars
    from splitft.compare.budget import Budget
    from splitft.compare.compare import ComparisonOptions, plan_runs, plan_tuning, tune_methods
    from splitft.compare.compare import compare as train_and_compare
    from splitft.compare.comparison_page import comparison_lines, comparison_tables

    out = out or Path("runs") / f"compare-{file.stem}"
    budget, names, given = Budget(None, until_seconds, until_examples), _listed(methods), overrides or []
    rows = plan_runs(file, names, _seeds(seeds), out, given)
    candidates = plan_tuning(file, names, rows[0].seed, out, given, tune) if tune else {}
    screen, choices = console(stderr=as_json), None
    planned = [one.row for tried in candidates.values() if len(tried) > 1 for one in tried]
    try:
        with ProgressBars(screen) as bars:
            if candidates:
                choices = tune_methods(candidates, budget, _RowProgress(planned, bars))
                rows = plan_runs(file, names, _seeds(seeds), out, given, choices)
            rows = planned = [replace(row, budget=budget) for row in rows]
            data = train_and_compare(
                rows,
                out,
                ComparisonOptions(target, _listed(tasks), choices or {}),
                listener=_RowProgress(rows, bars),
                progress=bars,
            )
    except KeyboardInterrupt:
        done = sum(row.finished for row in planned)
        ours = sys.argv[1:2] == ["compare"]
        command = shlex.join(["splitft", *sys.argv[1:]]) if ours else "the same command"
        end(
            f"stopped; {done} of {len(planned)} runs are safe in {out}. Continue with: {command}", INTERRUPTED
        )
    if as_json:
        typer.echo(json.dumps(data, indent=2))
        return
    for table in comparison_tables(data):
        screen.print()
        screen.print(table.to_rich())
    screen.print()
    for line in comparison_lines(data):
        screen.print(line, highlight=False, markup=False)
    say(screen, f"Report   {out / 'compare.html'}")


class _RowProgress:
    """A listener that shows each run as a bar of its steps, and the number of runs left."""

    def __init__(self, rows: Sequence[ComparisonRow], bars: ProgressBars) -> None:
        self._rows, self._bars = list(rows), bars
        self._steps = 0
        finished = sum(row.finished for row in rows)
        if finished:
            bars.say(f"{finished} of {len(rows)} runs are finished already")

    def __call__(self, row: ComparisonRow, event: Event) -> None:
        """Show an event of a run."""
        from splitft.tracking.events import Evaluated, RunDone, RunResumed, RunStarted, StepDone, Warned

        training = row.config.training
        name = f"{self._rows.index(row) + 1}/{len(self._rows)} {row.name}"
        clients = max(1, round(training.participation * row.config.clients.count))
        total = training.rounds * training.steps * clients
        match event:
            case RunStarted():
                self._steps = 0
                self._bars(name, 0, total)
            case RunResumed():
                self._steps = (event.round - 1) * training.steps * clients
                self._bars(name, self._steps, total)
            case StepDone():
                self._steps += 1
                self._bars(name, min(self._steps, total), total)
            case Evaluated() if event.round == training.rounds:
                left = sum(not other.finished for other in self._rows[self._rows.index(row) + 1 :])
                self._bars.say(
                    f"{name}: held-out loss {event.loss:.3f} after round {event.round}; "
                    f"{left} run{'' if left == 1 else 's'} left"
                )
            case Warned():
                self._bars.say(f"{name}: warning: {event.message}")
            case RunDone():
                self._bars.drop(name)
            case _:
                pass


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _seeds(text: str) -> list[int]:
    """Return the seeds 0, 1, 2 for `3`, and 0, 7 for `0,7`; a trailing comma makes a list of one."""
    parts = _listed(text)
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--seeds {text!r}: give their number, such as 3, or a list, such as 0,1,2")
    if "," not in text:
        return list(range(int(parts[0]))) if parts else []
    return list(dict.fromkeys(int(part) for part in parts))
