"""The verb that attacks what a run gives away: audit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitft.cli.ending import AsJson, console, verb

if TYPE_CHECKING:
    from splitft.privacy.findings import Outcome


@verb
def audit(
    target: Annotated[
        Path, typer.Argument(metavar="FILE|DIR", help="Configuration, or run folder with what it has learnt.")
    ],
    full: Annotated[
        bool, typer.Option("--full", help="More cuts, codecs and noise, and every attack; far longer.")
    ] = False,
    public: Annotated[
        str | None, typer.Option(help="Text that the attacker learns on [default: text of Python itself]")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with plots to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Attack what the server would see, and say how much of the text it can read."""
    from splitft.assemble.auditing import FULL, SHORT
    from splitft.assemble.auditing import audit as audited
    from splitft.privacy.findings import verdict
    from splitft.tracking import leaks
    from splitft.tracking.report import write_page

    screen = console(stderr=as_json)

    def say(outcome: Outcome) -> None:
        screen.print(verdict(outcome), highlight=False, markup=False, soft_wrap=True)

    told = audited(target, FULL if full else SHORT, public, listener=say).to_json()
    if html is not None:
        write_page(html, "What a split gives away", leaks.leaks_body(told))
    if as_json:
        typer.echo(json.dumps(told, indent=2))
        return
    screen.print()
    screen.print(leaks.how_audited(told), highlight=False, markup=False, soft_wrap=True)
    screen.print()
    screen.print(leaks.leak_table(told))
    if html is not None:
        screen.print(f"Plots    {html}", highlight=False, markup=False, soft_wrap=True)
