"""The verb that attacks what the server of a run receives: audit."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from splitft.cli.app import AsJson, console, say, verb


@verb
def audit(
    target: Annotated[
        Path, typer.Argument(metavar="FILE|DIR", help="Configuration file, or run folder with its adapters.")
    ],
    full: Annotated[
        bool, typer.Option("--full", help="Try more cuts, codecs and noise, and every attack; far slower.")
    ] = False,
    attacks: Annotated[
        str | None,
        typer.Option(help="Names with commas between.", show_default="all; without --full, the fast ones"),
    ] = None,
    public: Annotated[
        str | None,
        typer.Option(help="Text that the attacker learns from.", show_default="Python's documentation"),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with charts and all columns to this file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Attack what the server would receive, and measure how much of the text it can read."""
    from splitft.audit import auditor
    from splitft.audit.audit_page import attacker_sentence, audit_page, short_table
    from splitft.audit.findings import verdict
    from splitft.report.page import write_page

    screen = console(stderr=as_json)
    depth = auditor.FULL if full else auditor.SHORT
    if attacks is not None:
        depth = replace(depth, attacks=tuple(name.strip() for name in attacks.split(",")))
    found = auditor.audit(target, depth, public, listener=lambda result: say(screen, verdict(result)))
    data = found.to_json()
    if html is not None:
        write_page(html, audit_page(data))
    if as_json:
        typer.echo(json.dumps(data, indent=2))
        return
    say(screen, "", attacker_sentence(data), "")
    screen.print(short_table(data).to_rich())
    say(screen, "", *next_steps(target, html))


def next_steps(target: Path, html: Path | None) -> list[str]:
    """Return how to see the charts, and how to hide more."""
    command = shlex.join(["splitft", "audit", str(target), "--html", "leaks.html"])
    return [
        f"Charts   {command if html is None else html}",
        "Hide     privacy.hidden, privacy.gradient and privacy.labels add noise, which costs perplexity;",
        "         a deeper cut slows an attacker down; `method: fedlora` sends no hidden states at all.",
        "Refuse   schedule.max_recovery: 0.3 refuses cuts at which more can be read.",
    ]
