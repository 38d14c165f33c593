"""Verbs that look at a run before or after: plan, report, generate, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from splitft.cli.app import AsJson, ConfigFile, RunFolder, console, verb


@verb
def plan(
    file: ConfigFile,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as schedule.server=laptop")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict seconds, bytes and memory of every client at every cut; trains nothing."""
    from splitft.cli.plan_tables import choice_table, price_tables
    from splitft.config import load
    from splitft.run.plan import plan as planned

    result = planned(load(file, overrides or []))
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=2))
        return
    screen = console()
    for heading, table in price_tables(result.to_json()):
        screen.print(heading, highlight=False, markup=False, soft_wrap=True)
        screen.print(table)
        screen.print()
    screen.print(choice_table(result.to_json()))


@verb
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="One or several run folders.")],
    to: Annotated[Path | None, typer.Option(help="HTML file [default: report.html in the first DIR]")] = None,
) -> None:
    """Write one self-contained HTML page about a run, or about several side by side."""
    from splitft.report.page import read_run, write_report
    from splitft.tracking import comparability as same_data

    page = write_report(folders, to or folders[0] / "report.html")
    if len(folders) > 1:
        runs = [(str(folder), read_run(folder).summary) for folder in folders]
        for said in same_data.differences(runs):
            typer.echo(f"splitft: warning: these runs do not compare: {said}", err=True)
    typer.echo(page)


@verb
def generate(
    folder: RunFolder,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation, in tokens.")] = 60,
    base: Annotated[bool, typer.Option("--base", help="Without the adapter, for comparison.")] = False,
) -> None:
    """Let the fine-tuned model continue a prompt."""
    from splitft.run.results import generate as continued

    typer.echo(prompt + continued(folder, prompt, max_new_tokens=max_new_tokens, adapter=not base))


@verb
def export(
    folder: RunFolder,
    to: Annotated[Path, typer.Option(help="Folder to write.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="The whole model with the adapter folded in, not the adapter.")
    ] = False,
) -> None:
    """Write the adapter as a PEFT folder, or the merged model."""
    from splitft.run.results import export as exported

    typer.echo(exported(folder, to, merged=merged))
