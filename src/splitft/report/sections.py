"""The page about one run, section by section; side by side, runs share some of them.

    Told --header, figures, clients, charts, simulated clock--> HTML

A section is a function of what a run folder tells; one that has nothing to say is empty text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from splitft.report.charts import of_one_run
from splitft.report.markup import charts, count, table, text
from splitft.report.timeline import MACHINE_HEADINGS, machine_rows, of_the_clock
from splitft.tracking.evaluations import EVALUATION_HEADINGS, EVALUATION_NOTE, evaluation_rows
from splitft.tracking.events import Event, RoundTimed, RunStarted
from splitft.tracking.summary import (
    CLIENT_HEADINGS,
    change_text,
    client_rows,
    clock,
    headline,
    loss_text,
    spent_text,
)


@dataclass(frozen=True)
class RunRecord:
    """What a run folder tells."""

    name: str
    """How the page calls it: the folder's name."""
    started: RunStarted
    """Its first event."""
    events: list[Event]
    """Everything that counts."""
    summary: Mapping[str, Any]
    """The fold over them."""
    config: str
    """Its `config.yaml`, or nothing."""
    evaluations: Sequence[Mapping[str, Any]] = ()
    """What `splitft eval` found out about it."""


def one_run(told: RunRecord) -> str:
    """The page about one run."""
    started, summary = told.started, told.summary
    begun = datetime.fromtimestamp(started.t, UTC).strftime("%Y-%m-%d %H:%M UTC")
    facts = f"{summary['method']} · seed {summary['seed']} · splitft {summary['version']} · begun {begun}"
    return (
        f"<header>\n<p class=eyebrow>{text(told.name)}{state(told)}</p>\n<h1>{text(started.model)}</h1>\n"
        f"<p class=facts>{text(facts)}</p>\n</header>\n"
        f"<p class=verdict>{text(headline(summary))}</p>\n"
        f"{_figures(told)}{privacy(summary)}{warnings(summary)}"
        f"<h2>Clients</h2>\n{clients(summary)}{tasks(told)}"
        f"<h2>How it went</h2>\n{charts(of_one_run(summary, told.events, started.blocks))}"
        f"{_simulated_clock(told)}{config(told)}"
    )


def state(told: RunRecord) -> str:
    """Whether the run has come to its end, as a badge."""
    done, planned = told.summary["rounds"], told.started.rounds
    if told.summary["finished"]:
        return f" <span class='badge done'>finished, {count(done, 'round')}</span>"
    return f" <span class='badge open'>not finished: {done} of {count(planned, 'round')}</span>"


def _figures(told: RunRecord) -> str:
    """The few numbers that one looks for first."""
    summary, started = told.summary, told.started
    cuts = sorted({cut for client in summary["clients"] for cut in client["cut"]})
    span = str(cuts[0]) if len(cuts) == 1 else f"{cuts[0]} to {cuts[-1]}"
    up, down = (sum(counts[way] for counts in summary["bytes"].values()) / 1e6 for way in ("up", "down"))
    simulated = summary["simulated_seconds"]
    losses = summary["eval_loss"]
    figures = [
        (f"{loss_text(losses, 0)} → {loss_text(losses, -1)}", "held-out loss", change_text(losses)),
        (f"{len(summary['clients'])}", "clients", f"cut {span} of {started.blocks} blocks"),
        (f"{summary['tokens']:,}", "tokens trained on", f"in {count(summary['steps'], 'step')}"),
        (f"{up + down:,.1f} MB", "sent in training", f"{up:,.1f} up, {down:,.1f} down"),
        (
            clock(summary["wall_seconds"]),
            "on the clock",
            "" if simulated is None else f"simulated {clock(simulated)}",
        ),
    ]
    cells = "".join(
        f"<div><dt>{text(label)}</dt><dd>{text(number)}<small>{text(note)}</small></dd></div>\n"
        for number, label, note in figures
    )
    return f"<dl class=figures>\n{cells}</dl>\n"


def privacy(summary: Mapping[str, Any]) -> str:
    """What the server can read of the clients' text."""
    kind = "note" if summary["labels"] == "client" else "note warn"
    notes = f"<p class='{kind}'><b>What the server can read.</b> {text(summary['privacy'])}</p>\n"
    for promise in summary.get("defences") or ():
        notes += f"<p class=note><b>Defence.</b> {text(promise)}</p>\n"
    for spent in (summary.get("privacy_spent") or ())[-1:]:
        notes += f"<p class=note><b>Spent on updates.</b> {text(spent_text(spent))}</p>\n"
    return notes


def warnings(summary: Mapping[str, Any]) -> str:
    """Each warning once, and how often it came."""
    counts = {message: summary["warnings"].count(message) for message in summary["warnings"]}
    notes = ""
    for message, often in counts.items():
        times = f", {often} times" if often > 1 else ""
        notes += f"<p class='note warn'><b>Warning{times}.</b> {text(message)}</p>\n"
    return notes


def clients(summary: Mapping[str, Any]) -> str:
    """A row of numbers for each client."""
    held = [f"{client['eval_examples']:,}" for client in summary["clients"]]
    cut_off = [f"{client['truncated']:,}" for client in summary["clients"]]
    rows = [(*row, *rest) for row, *rest in zip(client_rows(summary), held, cut_off, strict=True)]
    note = (
        "Examples and tokens are what a client trained on, counted as often as it saw them; losses are of "
        "its held-out examples; truncated are those longer than <code>data.max_tokens</code>."
    )
    return table((*CLIENT_HEADINGS, "held out", "truncated"), rows) + f"<p class=caption>{note}</p>\n"


def tasks(told: RunRecord) -> str:
    """What the run's model can do, as `splitft eval` measured it; nothing where it did not."""
    if not told.evaluations:
        return ""
    rows = evaluation_rows(told.evaluations, told.summary["rounds"])
    return f"<h2>Tasks</h2>\n{table(EVALUATION_HEADINGS, rows)}<p class=caption>{EVALUATION_NOTE}</p>\n"


def _simulated_clock(told: RunRecord) -> str:
    """Where the time would go on the machines that the configuration describes; nothing without them."""
    timed = [event for event in told.events if isinstance(event, RoundTimed)]
    if not timed:
        return ""
    note = (
        "Foretold from descriptions of devices and links, not measured. Idle is the share of the rounds, "
        "without moving, in which a client's processor, or the server, did not compute."
    )
    machines = table(MACHINE_HEADINGS, machine_rows(timed, told.started.machines), "machines")
    return f"<h2>Simulated clock</h2>\n{charts(of_the_clock(timed))}{machines}<p class=caption>{note}</p>\n"


def config(told: RunRecord) -> str:
    """The configuration as the user wrote it, folded away."""
    if not told.config:
        return ""
    return f"<details>\n<summary>Configuration</summary>\n<pre>{text(told.config)}</pre>\n</details>\n"
