"""The sections of the page about one run; pages about several runs repeat some of them.

RunRecord --run_values--> values of sections.html.j2 --one_run--> HTML
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from splitft.report.charts import one_run_charts
from splitft.report.page import count, render
from splitft.report.run_record import RunRecord
from splitft.report.timeline import clock_charts, machine_table
from splitft.tracking.evaluations import evaluation_table
from splitft.tracking.events import RoundTimed
from splitft.tracking.summary import (
    change_text,
    client_table,
    clock,
    headline,
    loss_text,
    share_text,
    spent_text,
)
from splitft.tracking.table import Table

COLUMNS = ("held out", "truncated", "accuracy after")
"""Columns of the table of clients for which the terminal has no room."""


def one_run(run: RunRecord) -> str:
    """Return the page about one run."""
    started, summary = run.started, run.summary
    begun = datetime.fromtimestamp(started.t, UTC).strftime("%Y-%m-%d %H:%M UTC")
    timed = [event for event in run.events if isinstance(event, RoundTimed)]
    return render(
        "report/templates/run.html.j2",
        title=f"{run.name} · {started.model}",
        model=started.model,
        about=f"{summary['method']} · seed {summary['seed']} · splitft {summary['version']} · begun {begun}",
        run=run_values(run),
        figures=_figures(run),
        charts=one_run_charts(summary, run.events, started.blocks),
        clock_charts=clock_charts(timed),
        machines=machine_table(timed, started.machines) if timed else None,
    )


def run_values(run: RunRecord) -> dict[str, Any]:
    """Return what `sections.html.j2` shows of a run."""
    done, planned = run.summary["rounds"], run.started.rounds
    finished = run.summary["finished"]
    return {
        "name": run.name,
        "finished": finished,
        "state": f"finished, {count(done, 'round')}"
        if finished
        else f"not finished: {done} of {count(planned, 'round')}",
        "headline": headline(run.summary),
        "notes": _notes(run.summary),
        "clients": _clients(run.summary),
        "evaluations": evaluation_table(run.evaluations, done) if run.evaluations else None,
        "config": run.config,
    }


def _figures(run: RunRecord) -> list[tuple[str, str, str]]:
    """Return the most important numbers: label, number and note."""
    summary, losses, simulated = run.summary, run.summary["eval_loss"], run.summary["simulated_seconds"]
    right = share_text(summary["eval_accuracy"])
    cuts = sorted({cut for client in summary["clients"] for cut in client["cut"]})
    span = str(cuts[0]) if len(cuts) == 1 else f"{cuts[0]} to {cuts[-1]}"
    up, down = (sum(counts[way] for counts in summary["bytes"].values()) / 1e6 for way in ("up", "down"))
    return [
        ("held-out loss", f"{loss_text(losses, 0)} → {loss_text(losses, -1)}", change_text(losses)),
        *([("token accuracy", right, "of the held-out tokens")] if right != "–" else []),
        ("clients", f"{len(summary['clients'])}", f"cut {span} of {run.started.blocks} blocks"),
        ("tokens trained on", f"{summary['tokens']:,}", f"in {count(summary['steps'], 'step')}"),
        ("sent in training", f"{up + down:,.1f} MB", f"{up:,.1f} up, {down:,.1f} down"),
        (
            "on the clock",
            clock(summary["wall_seconds"]),
            "" if simulated is None else f"simulated {clock(simulated)}",
        ),
    ]


def _notes(summary: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Return title, text and alarm: what the server can read, the defences, and each warning once."""
    notes = [("What the server can read.", summary["privacy"], summary["labels"] != "client")]
    notes += [("Defence.", promise, False) for promise in summary.get("defences") or ()]
    notes += [
        ("Spent on updates.", spent_text(spent), False) for spent in (summary.get("privacy_spent") or ())[-1:]
    ]
    for message in dict.fromkeys(summary["warnings"]):
        often = summary["warnings"].count(message)
        notes.append((f"Warning, {often} times." if often > 1 else "Warning.", message, True))
    return notes


def _clients(summary: Mapping[str, Any]) -> Table:
    """Return the table of clients with more columns than the terminal has room for."""
    table = client_table(summary)
    rows = [
        (*row, f"{client['eval_examples']:,}", f"{client['truncated']:,}", share_text(client["accuracy"]))
        for row, client in zip(table.rows, summary["clients"], strict=True)
    ]
    return replace(table, headings=(*table.headings, *COLUMNS), rows=rows)
