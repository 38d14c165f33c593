"""Verbs that look at text and methods: shares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from splitft.cli.ending import AsJson, ConfigFile, console, verb

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
