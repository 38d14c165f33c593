"""One HTML page about a run, or about several side by side.

    run folders --read_run--> [Told] --page--> report.html     page.css and page.js are written into it,
                                                               and plotly.js, once: it works offline

Everything that comes from a run (names, warnings, the configuration) is escaped, and the charts' data are
JSON that cannot end its own script element.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from splitft.errors import RunError
from splitft.tracking.charts import Chart, of_one_run, of_several_runs
from splitft.tracking.events import Event, RunStarted, read_events, settled
from splitft.tracking.summary import (
    CLIENT_HEADINGS,
    change_text,
    client_rows,
    clock,
    loss_text,
    summarise,
    verdict,
)


@dataclass(frozen=True)
class Told:
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


def write_report(folders: Sequence[Path], to: Path) -> Path:
    """Write the page about these run folders to a file, and return its path.

    Raises RunError if a folder holds no run, or one that stopped before it had its model and text.
    """
    if not folders:
        raise RunError("a report needs at least one run folder")
    told = [read_run(folder) for folder in folders]
    if len({one.name for one in told}) < len(told):
        told = [read_run(folder, str(folder)) for folder in folders]
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(page(told), encoding="utf-8")
    return to


def read_run(folder: Path, name: str | None = None) -> Told:
    """Read one run folder; what it did before it was resumed is left out where it was done again."""
    path = folder / "events.jsonl"
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise RunError(f"{folder} {what}; give a run folder, as `splitft train` leaves it")
    if not path.is_file():
        raise RunError(
            f"{folder} is no run folder: it has no events.jsonl; give one that `splitft train` left"
        )
    events = settled(read_events(path))
    started = next((event for event in events if isinstance(event, RunStarted)), None)
    if started is None:
        raise RunError(f"{folder}: the run stopped before its training began, so there is nothing to report")
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    return Told(name or folder.resolve().name, started, events, summarise(events), text)


def page(told: Sequence[Told]) -> str:
    """The whole page as text."""
    if len(told) == 1:
        title, body = f"{told[0].name} · {told[0].started.model}", _one(told[0])
    else:
        title, body = f"{len(told)} runs side by side", _several(told)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n"
        f"<style>\n{_asset('page.css')}</style>\n</head>\n<body>\n<main>\n{body}</main>\n"
        f"<script>{_plotly()}</script>\n<script>\n{_asset('page.js')}</script>\n</body>\n</html>\n"
    )


# ---- one run -----------------------------------------------------------------------------------------


def _one(told: Told) -> str:
    """The page about one run."""
    started, summary = told.started, told.summary
    begun = datetime.fromtimestamp(started.t, UTC).strftime("%Y-%m-%d %H:%M UTC")
    facts = f"{summary['method']} · seed {summary['seed']} · splitft {summary['version']} · begun {begun}"
    return (
        f"<header>\n<p class=eyebrow>{_text(told.name)}{_state(told)}</p>\n<h1>{_text(started.model)}</h1>\n"
        f"<p class=facts>{_text(facts)}</p>\n</header>\n"
        f"<p class=verdict>{_text(verdict(summary))}</p>\n"
        f"{_figures(told)}{_privacy(summary)}{_warnings(summary)}"
        f"<h2>Clients</h2>\n{_clients(summary)}"
        f"<h2>How it went</h2>\n{_charts(of_one_run(summary, told.events, started.blocks))}{_config(told)}"
    )


def _state(told: Told) -> str:
    """Whether the run has come to its end, as a badge."""
    done, planned = told.summary["rounds"], told.started.rounds
    if told.summary["finished"]:
        return f" <span class='badge done'>finished, {_count(done, 'round')}</span>"
    return f" <span class='badge open'>not finished: {done} of {_count(planned, 'round')}</span>"


def _figures(told: Told) -> str:
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
        (f"{summary['tokens']:,}", "tokens trained on", f"in {_count(summary['steps'], 'step')}"),
        (f"{up + down:,.1f} MB", "sent in training", f"{up:,.1f} up, {down:,.1f} down"),
        (
            clock(summary["wall_seconds"]),
            "on the clock",
            "" if simulated is None else f"simulated {clock(simulated)}",
        ),
    ]
    cells = "".join(
        f"<div><dt>{_text(label)}</dt><dd>{_text(number)}<small>{_text(note)}</small></dd></div>\n"
        for number, label, note in figures
    )
    return f"<dl class=figures>\n{cells}</dl>\n"


def _privacy(summary: Mapping[str, Any]) -> str:
    kind = "note" if summary["labels"] == "client" else "note warn"
    return f"<p class='{kind}'><b>What the server can read.</b> {_text(summary['privacy'])}</p>\n"


def _warnings(summary: Mapping[str, Any]) -> str:
    counts = {message: summary["warnings"].count(message) for message in summary["warnings"]}
    text = ""
    for message, count in counts.items():
        times = f", {count} times" if count > 1 else ""
        text += f"<p class='note warn'><b>Warning{times}.</b> {_text(message)}</p>\n"
    return text


def _clients(summary: Mapping[str, Any]) -> str:
    held = [f"{client['eval_examples']:,}" for client in summary["clients"]]
    cut_off = [f"{client['truncated']:,}" for client in summary["clients"]]
    rows = [(*row, *rest) for row, *rest in zip(client_rows(summary), held, cut_off, strict=True)]
    note = (
        "Examples and tokens are what a client trained on, counted as often as it saw them; losses are of "
        "its held-out examples; truncated are those longer than <code>data.max_tokens</code>."
    )
    return _table((*CLIENT_HEADINGS, "held out", "truncated"), rows) + f"<p class=caption>{note}</p>\n"


def _config(told: Told) -> str:
    if not told.config:
        return ""
    return f"<details>\n<summary>Configuration</summary>\n<pre>{_text(told.config)}</pre>\n</details>\n"


# ---- several runs ------------------------------------------------------------------------------------


def _several(told: Sequence[Told]) -> str:
    """The page about several runs."""
    summaries = {one.name: one.summary for one in told}
    charts = of_several_runs(summaries, {one.name: one.events for one in told})
    differing = _differences(told)
    differences = _table(("key", *(one.name for one in told)), differing)
    differences = f"<h2>What differs</h2>\n{differences}" if differing else ""
    runs = "".join(
        f"<h2>{_text(one.name)}{_state(one)}</h2>\n<p class=facts>{_text(verdict(one.summary))}</p>\n"
        f"{_privacy(one.summary)}{_warnings(one.summary)}{_clients(one.summary)}{_config(one)}"
        for one in told
    )
    return (
        f"<header>\n<p class=eyebrow>splitft</p>\n<h1>{len(told)} runs side by side</h1>\n</header>\n"
        f"{_runs(told)}{differences}"
        f"<h2>How they went</h2>\n{_charts(charts)}{runs}"
    )


def _runs(told: Sequence[Told]) -> str:
    """One row a run."""
    headings = (
        "run", "method", "model", "seed", "rounds", "loss before", "loss after", "change",
        "tokens", "MB", "time",
    )  # fmt: skip
    rows = []
    for one in told:
        summary, losses = one.summary, one.summary["eval_loss"]
        sent = sum(sum(counts.values()) for counts in summary["bytes"].values()) / 1e6
        of = "" if summary["finished"] else f" of {one.started.rounds}"
        rows.append(
            (
                one.name,
                summary["method"],
                summary["model"],
                str(summary["seed"]),
                f"{summary['rounds']}{of}",
                loss_text(losses, 0),
                loss_text(losses, -1),
                change_text(losses),
                f"{summary['tokens']:,}",
                f"{sent:,.1f}",
                clock(summary["wall_seconds"]),
            )
        )
    return _table(headings, rows)


def _differences(told: Sequence[Told]) -> list[tuple[str, ...]]:
    """The configuration keys on which the runs differ, with each run's value."""
    flat = [dict(_leaves(_mapping(one.config))) for one in told]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [(key, *(one.get(key, "–") for one in flat)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _mapping(config: str) -> Mapping[str, Any]:
    try:
        data = yaml.safe_load(config)
    except yaml.YAMLError:
        return {}  # the page shows its text all the same
    return data if isinstance(data, dict) else {}


def _leaves(data: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    """Every value with its dotted path."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{before}{key}.")
        else:
            plain = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            yield f"{before}{key}", plain


# ---- parts -------------------------------------------------------------------------------------------


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th scope=col>{_text(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
    return f"<div class=scroll>{table}</div>\n"


def _charts(charts: Iterable[Chart]) -> str:
    """Each chart's words and, for page.js to draw, its figure as JSON."""
    parts = []
    for chart in charts:
        figure = json.dumps({"data": chart.data, "layout": chart.layout}, allow_nan=False)
        safe = figure.replace("<", "\\u003c")  # so that no name can end the script element
        parts.append(
            f"<figure>\n<figcaption><b>{_text(chart.title)}</b> {_text(chart.caption)}</figcaption>\n"
            f'<div class=chart></div>\n<script type="application/json">{safe}</script>\n</figure>\n'
        )
    lacking = "<noscript><p class='note warn'>The charts need JavaScript.</p></noscript>\n"
    return f"{lacking}<div class=charts>\n{''.join(parts)}</div>\n"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _text(text: str) -> str:
    """Text as it is, whatever is in it."""
    return html.escape(text)


def _asset(name: str) -> str:
    return files("splitft.tracking").joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    return files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")
