"""The verb that attacks what a run gives away: audit."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitft.cli.app import AsJson, console, verb

if TYPE_CHECKING:
    from splitft.audit.findings import AuditResult


@verb
def audit(
    target: Annotated[
        Path, typer.Argument(metavar="FILE|DIR", help="Configuration, or run folder with what it has learnt.")
    ],
    full: Annotated[
        bool, typer.Option("--full", help="More cuts, codecs and noise, and every attack: far longer.")
    ] = False,
    public: Annotated[
        str | None, typer.Option(help="Text that the attacker learns on, instead of Python's own.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with plots and all columns to this file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Attack what the server would see, and say how much of the text it can read."""
    from splitft.audit import report as leaks
    from splitft.audit.audit import FULL, SHORT
    from splitft.audit.audit import audit as audited
    from splitft.audit.findings import verdict
    from splitft.report.page import write_page

    screen = console(stderr=as_json)

    def say(outcome: AuditResult) -> None:
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
    screen.print()
    for line in next_steps(target, html):
        screen.print(line, highlight=False, markup=False, soft_wrap=True)


def next_steps(target: Path, html: Path | None) -> list[str]:
    """Where the plots are or how to get them, and what hides more."""
    plots = (
        str(html)
        if html is not None
        else shlex.join(["splitft", "audit", str(target), "--html", "leaks.html"])
    )
    return [
        f"Plots    {plots}",
        "Hide     privacy.hidden, privacy.gradient and privacy.labels add noise, which costs perplexity;",
        "         a deeper cut slows an attacker down; `method: fedlora` sends no hidden states at all.",
        "Insist   schedule.max_recovery: 0.3 refuses cuts at which more can be read.",
    ]
