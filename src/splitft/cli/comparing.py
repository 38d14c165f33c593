"""Verbs that measure text, runs and methods: shares, eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from splitft.cli.ending import AsJson, ConfigFile, RunFolder, console, verb

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
    from splitft.assemble import shares as shared
    from splitft.config import load
    from splitft.tracking import shares as showing
    from splitft.tracking.report import write_page

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
    as_json: AsJson = False,
) -> None:
    """Measure what a run's model can do: perplexity, BLEU, ROUGE-L and chrF, or exact match."""
    from splitft.assemble import Trial, evaluate
    from splitft.assemble.evaluating import source_is_trained_on
    from splitft.tracking.counting import Counting
    from splitft.tracking.evaluations import evaluation_table, sample_lines

    tasks = tuple(name.strip() for name in task.split(",")) if task is not None else ()
    trial = Trial(tasks, data, tuple(overrides or ()), not base, batch_size, max_new_tokens)
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
