"""The report's charts: what a run's events show, as plain plotly.js figures.

    summary, events --held_out_loss, training_loss, ...--> Chart --report--> drawn in the page by plotly.js

A chart is data and axes only; `page.js` adds fonts and colours, so that one page reads well in the light
and in the dark: the colours named "ink" and "faint" are the page's own. Plotly reads names as a kind of
HTML, so they are escaped here.
"""

from __future__ import annotations

import html
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from splitft.tracking.events import CutsChanged, Event, StepDone

COLOURS = (
    "#3b82c4", "#e07b39", "#3a9d5d", "#8e6bbf", "#d1495b", "#2a9d9d", "#a1714f", "#d77fb3", "#9a9a33",
)  # fmt: skip
LEGIBLE = len(COLOURS)
"""Beyond this many, lines are drawn faint and without a legend: their spread is the message."""
MOST_POINTS = 400
"""Longer lines are drawn as means of neighbouring points."""
ALL = "all clients"

Line = tuple[Sequence[float], Sequence[float | None]]
"""x and y; None leaves a gap."""


@dataclass(frozen=True)
class Chart:
    """One figure and the words around it."""

    title: str
    """What it shows."""
    caption: str
    """How to read it, in a sentence."""
    data: list[dict[str, Any]]
    """Traces, as plotly.js takes them."""
    layout: dict[str, Any] = field(default_factory=dict)
    """Axes, as plotly.js takes them."""
    notes: tuple[str, ...] = ()
    """Sentences to list below it."""
    wide: bool = False
    """Whether it takes the whole width of the page."""
    height: int = 320
    """Of the drawing, in pixels."""


def of_one_run(summary: Mapping[str, Any], events: Sequence[Event], blocks: int) -> list[Chart]:
    """All charts of one run that have something to show."""
    charts = [
        held_out_loss(summary),
        training_loss(events),
        cuts_by_round(summary, blocks, events),
        traffic(summary),
        seconds_by_leg({"": summary}),
        aggregation_error({"": summary}),
    ]
    return [chart for chart in charts if chart.data]


def of_several_runs(
    summaries: Mapping[str, Mapping[str, Any]], events: Mapping[str, Sequence[Event]]
) -> list[Chart]:
    """Runs side by side, by their names."""
    losses = {name: _by_round(summary["eval_loss"], first=0) for name, summary in summaries.items()}
    steps = {name: mean_by_step(_steps(told)) for name, told in events.items()}
    charts = [
        Chart(
            "Held-out loss",
            "Of the global adapters on all clients' held-out text; round 0 is before training.",
            _lines(losses, markers=True),
            titled_axes("round", "nats per token", max(len(line[0]) for line in losses.values())),
        ),
        Chart(
            "Training loss",
            "Mean over the clients of their batches' loss at each local step.",
            _lines(steps),
            titled_axes("step", "nats per token"),
        ),
        _traffic_of_runs(summaries),
        seconds_by_leg(summaries),
        aggregation_error(summaries),
    ]
    return [chart for chart in charts if chart.data]


def held_out_loss(summary: Mapping[str, Any]) -> Chart:
    """Loss on held-out text by round, of all clients and of each."""
    lines = {client["name"]: _by_round(client["loss"], first=0) for client in summary["clients"]}
    return Chart(
        "Held-out loss",
        "Of the global adapters on each client's held-out text; round 0 is before training.",
        _lines(lines, bold=_by_round(summary["eval_loss"], first=0), markers=True),
        titled_axes("round", "nats per token", len(summary["eval_loss"])),
    )


def training_loss(events: Iterable[Event]) -> Chart:
    """Loss of each batch, by the client's step."""
    steps = _steps(events)
    lines: defaultdict[str, dict[int, float]] = defaultdict(dict)
    for step in steps:
        lines[step.client][step.step] = step.loss
    each = {name: (list(line), list(line.values())) for name, line in sorted(lines.items())}
    return Chart(
        "Training loss",
        "Of each client's own batches, by its local step. Batches differ, so single lines are rough.",
        _lines(each, bold=mean_by_step(steps)),
        titled_axes("step", "nats per token"),
    )


def cuts_by_round(summary: Mapping[str, Any], blocks: int, events: Iterable[Event]) -> Chart:
    """How many blocks each client held in each round, and why its controller chose so."""
    changes = [event for event in events if isinstance(event, CutsChanged) and event.reason]
    lines = {client["name"]: _by_round(client["cut"], first=1) for client in summary["clients"]}
    axes = titled_axes("round", "blocks on the client", max(summary["rounds"], 1))
    axes["yaxis"] |= {"range": [0, blocks * 1.03]}
    return Chart(
        "Cuts",
        f"Blocks that each client holds, of the model's {blocks}; the server holds the rest.",
        [trace | {"line": trace["line"] | {"shape": "hv"}} for trace in _lines(lines, markers=True)],
        axes,
        tuple(f"Round {change.round}: {change.reason}" for change in changes),
    )


def traffic(summary: Mapping[str, Any]) -> Chart:
    """Megabytes by role and direction; what evaluation sent is one bar more."""
    totals = {role: dict(counts) for role, counts in summary["bytes"].items()}
    totals["evaluation"] = {
        way: sum(counts[way] for counts in summary["evaluation_bytes"].values()) for way in ("up", "down")
    }
    roles = [role for role, counts in totals.items() if any(counts.values())]
    data = [
        {
            "type": "bar",
            "name": way,
            "x": roles,
            "y": [totals[role][way] / 1e6 for role in roles],
            "marker": {"color": colour},
        }
        for way, colour in zip(("up", "down"), COLOURS, strict=False)
    ]
    return Chart(
        "Bytes on the wire",
        "All clients together; up is from a client to the server. Evaluation is counted apart from training.",
        data if roles else [],
        {"barmode": "group", **titled_axes("", "MB")},
    )


def _traffic_of_runs(summaries: Mapping[str, Mapping[str, Any]]) -> Chart:
    """Megabytes of training by run, stacked by role."""
    roles = list(next(iter(summaries.values()))["bytes"])
    totals = {
        role: [sum(summary["bytes"][role].values()) / 1e6 for summary in summaries.values()] for role in roles
    }
    data = [
        {
            "type": "bar",
            "name": role,
            "x": [plain(name) for name in summaries],
            "y": total,
            "marker": {"color": colour},
        }
        for colour, (role, total) in zip(COLOURS, totals.items(), strict=False)
        if any(total)
    ]
    caption = "Of training, both directions, all clients together; evaluation is left out."
    return Chart("Bytes on the wire", caption, data, {"barmode": "stack", **titled_axes("", "MB")})


def seconds_by_leg(summaries: Mapping[str, Mapping[str, Any]]) -> Chart:
    """Where the time of the steps went, one bar a leg and run."""
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": plain(name),
            "y": [leg.replace("_", " ") for leg in summary["seconds_by_leg"]],
            "x": list(summary["seconds_by_leg"].values()),
            "marker": {"color": COLOURS[index % LEGIBLE]},
        }
        for index, (name, summary) in enumerate(summaries.items())
        if summary["seconds_by_leg"]
    ]
    axes = titled_axes("seconds", "")
    axes["yaxis"] |= {"autorange": "reversed", "automargin": True, "showgrid": False}
    caption = "Wall time of the training steps, summed over clients and rounds."
    return Chart("Seconds by leg", caption, data, {"barmode": "group", "hovermode": "y", **axes})


def aggregation_error(summaries: Mapping[str, Mapping[str, Any]]) -> Chart:
    """How far the global adapters are from the mean of the clients' updates, by round."""
    lines = {name: _by_round(summary["aggregation_error"], first=1) for name, summary in summaries.items()}
    axes = titled_axes("round", "relative error", max(len(line[0]) for line in lines.values()))
    axes["yaxis"] |= {"rangemode": "tozero"}
    return Chart(
        "Aggregation error",
        "Lost when the clients' updates become one adapter: ‖mean(BA) − BA‖ / ‖mean(BA)‖; 0 is exact.",
        _lines(lines, markers=True),
        axes,
    )


def mean_by_step(steps: Iterable[StepDone]) -> Line:
    """Token-weighted mean loss of whoever took each step."""
    sums: defaultdict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for step in steps:
        if math.isfinite(step.loss):
            sums[step.step][0] += step.loss * step.tokens
            sums[step.step][1] += step.tokens
    means = {number: total / tokens for number, (total, tokens) in sorted(sums.items()) if tokens}
    return list(means), list(means.values())


def thinned(line: Line, most: int = MOST_POINTS) -> Line:
    """A line of at most `most` points: means over equal windows of neighbours."""
    xs, ys = line
    window = math.ceil(len(xs) / most)
    if window <= 1:
        return line
    starts = range(0, len(xs), window)
    known = [
        [y for y in ys[start : start + window] if y is not None and math.isfinite(y)] for start in starts
    ]
    return [xs[start] for start in starts], [sum(part) / len(part) if part else None for part in known]


def _lines(
    lines: Mapping[str, Line], bold: Line | None = None, markers: bool = False
) -> list[dict[str, Any]]:
    """One trace a name; `bold` is that of all together, drawn last and in ink."""
    crowd = len(lines) > LEGIBLE
    traces = []
    for index, (name, line) in enumerate(lines.items()):
        colour, width = ("faint", 1.0) if crowd else (COLOURS[index % LEGIBLE], 1.6)
        trace = _trace(name, line, colour, width, markers and not crowd)
        traces.append(trace | {"showlegend": bool(name) and not crowd})
    if bold is not None and len(lines) > 1:
        traces.append(_trace(ALL, bold, "ink", 3, markers))
    return [trace for trace in traces if any(y is not None for y in trace["y"])]


def _trace(name: str, line: Line, colour: str, width: float, markers: bool) -> dict[str, Any]:
    xs, ys = thinned(line)
    return {
        "type": "scatter",
        "mode": "lines+markers" if markers else "lines",
        "name": plain(name),
        "x": list(xs),
        "y": [None if y is None or not math.isfinite(y) else round(y, 6) for y in ys],
        "line": {"color": colour, "width": width},
        "marker": {"color": colour, "size": 5 + width},
    }


def titled_axes(x: str, y: str, rounds: int = 0) -> dict[str, Any]:
    """Titles of both axes; rounds are whole numbers, a dozen ticks at most."""
    whole = {"tickformat": "d", "dtick": math.ceil(rounds / 12)} if rounds else {}
    names = {} if x else {"showgrid": False}  # an axis without a title has names on it
    return {"xaxis": {"title": {"text": x}} | whole | names, "yaxis": {"title": {"text": y}}}


def _by_round(values: Sequence[float | None], first: int) -> Line:
    return list(range(first, first + len(values))), values


def _steps(events: Iterable[Event]) -> list[StepDone]:
    return [event for event in events if isinstance(event, StepDone)]


def plain(name: str) -> str:
    """A name that plotly shows as it is."""
    return html.escape(name, quote=False)
