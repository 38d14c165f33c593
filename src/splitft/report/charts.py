"""Charts of a run's events, as plotly traces.

    summary, events --held_out_loss, training_loss, ...--> Chart --page.js--> drawn in the page by plotly.js

A chart holds its traces and its axes; `page.js` adds fonts and colors. A color such as `var(--ink)` is a
variable of `page.css`, which has a value for light and one for dark. Plotly reads names as a kind of HTML,
so they are escaped here.
"""

from __future__ import annotations

import html
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go

from splitft.tracking.events import CutsChanged, Event, StepDone

COLORS = (
    "#3b82c4", "#e07b39", "#3a9d5d", "#8e6bbf", "#d1495b", "#2a9d9d", "#a1714f", "#d77fb3", "#9a9a33",
)  # fmt: skip
INK, FAINT = "var(--ink)", "var(--faint)"
MAX_COLORED = len(COLORS)
"""With more series than this, lines are drawn faint and without a legend: only their spread matters."""
MAX_POINTS = 400
"""Longer series are drawn as means of neighboring points."""
ALL = "all clients"

Series = tuple[Sequence[float], Sequence[float | None]]
"""x and y; None leaves a gap."""
Trace = Any
"""A trace of `plotly.graph_objects`, which has no types."""


@dataclass(frozen=True)
class Chart:
    """One figure and the words around it."""

    title: str
    caption: str
    """How to read it, in a sentence."""
    data: Sequence[Trace]
    layout: Any = field(default_factory=go.Layout)
    """A `plotly.graph_objects.Layout`: the axes."""
    notes: tuple[str, ...] = ()
    """Sentences to list below it."""
    wide: bool = False
    """Take the whole width of the page."""
    height: int = 320
    """Height of the drawing, in pixels."""

    def figure(self) -> dict[str, Any]:
        """Return the figure as plotly.js takes it."""
        return {"data": [one.to_plotly_json() for one in self.data], "layout": self.layout.to_plotly_json()}


def one_run_charts(summary: Mapping[str, Any], events: Sequence[Event], blocks: int) -> list[Chart]:
    """Return all charts of one run that have something to show."""
    charts = [
        held_out_loss(summary),
        held_out_accuracy(summary),
        training_loss(events),
        cuts_by_round(summary, blocks, events),
        traffic(summary),
        seconds_by_leg({"": summary}),
        aggregation_error({"": summary}),
    ]
    return [chart for chart in charts if chart.data]


def several_runs_charts(
    summaries: Mapping[str, Mapping[str, Any]], events: Mapping[str, Sequence[Event]]
) -> list[Chart]:
    """Return the charts that compare runs, which are given by their names."""
    losses, accuracies = (
        {name: _by_round(summary[key], first=0) for name, summary in summaries.items()}
        for key in ("eval_loss", "eval_accuracy")
    )
    steps = {name: mean_by_step(_steps(of_run)) for name, of_run in events.items()}
    charts = [
        Chart(
            "Held-out loss",
            "Of the global adapters on all clients' held-out text; round 0 is before training.",
            _lines(losses, markers=True),
            axes("round", "nats per token", max(len(xs) for xs, _ in losses.values())),
        ),
        Chart(
            "Held-out token accuracy",
            "Share of all clients' labelled tokens that the global adapters give the highest probability.",
            _lines(accuracies, markers=True),
            axes("round", "share of tokens", max(len(xs) for xs, _ in losses.values())),
        ),
        Chart(
            "Training loss",
            "Mean over the clients of their batches' loss at each local step.",
            _lines(steps),
            axes("step", "nats per token"),
        ),
        _traffic_of_runs(summaries),
        seconds_by_leg(summaries),
        aggregation_error(summaries),
    ]
    return [chart for chart in charts if chart.data]


def held_out_loss(summary: Mapping[str, Any]) -> Chart:
    """Draw the loss on held-out text by round, of all clients and of each."""
    lines = {client["name"]: _by_round(client["loss"], first=0) for client in summary["clients"]}
    return Chart(
        "Held-out loss",
        "Of the global adapters on each client's held-out text; round 0 is before training.",
        _lines(lines, bold=_by_round(summary["eval_loss"], first=0), markers=True),
        axes("round", "nats per token", len(summary["eval_loss"])),
    )


def held_out_accuracy(summary: Mapping[str, Any]) -> Chart:
    """Draw the token accuracy on held-out text by round, of all clients and of each."""
    accuracies = summary["eval_accuracy"]
    lines = {client["name"]: _by_round(client["accuracy"], first=0) for client in summary["clients"]}
    return Chart(
        "Held-out token accuracy",
        "Share of the labelled tokens that the global adapters give the highest probability.",
        _lines(lines, bold=_by_round(accuracies, first=0), markers=True),
        axes("round", "share of tokens", len(accuracies)),
    )


def training_loss(events: Iterable[Event]) -> Chart:
    """Draw the loss of each batch, by the client's step."""
    steps = _steps(events)
    lines: defaultdict[str, dict[int, float]] = defaultdict(dict)
    for step in steps:
        if step.loss is not None:
            lines[step.client][step.step] = step.loss
    each = {name: (list(line), list(line.values())) for name, line in sorted(lines.items())}
    return Chart(
        "Training loss",
        "Of each client's own batches, by its local step. Batches differ, so single lines are rough.",
        _lines(each, bold=mean_by_step(steps)),
        axes("step", "nats per token"),
    )


def cuts_by_round(summary: Mapping[str, Any], blocks: int, events: Iterable[Event]) -> Chart:
    """Draw how many blocks each client held in each round; list why its controller moved the cut."""
    changes = [event for event in events if isinstance(event, CutsChanged) and event.reason]
    lines = {client["name"]: _by_round(client["cut"], first=1) for client in summary["clients"]}
    return Chart(
        "Cuts",
        f"Blocks that each client holds, of the model's {blocks}; the server holds the rest.",
        [trace.update(line_shape="hv") for trace in _lines(lines, markers=True)],
        axes("round", "blocks on the client", max(summary["rounds"], 1), yaxis_range=[0, blocks * 1.03]),
        tuple(f"Round {change.round}: {change.reason}" for change in changes),
    )


def traffic(summary: Mapping[str, Any]) -> Chart:
    """Draw megabytes by role and direction; evaluation has a bar of its own."""
    totals = {role: dict(counts) for role, counts in summary["bytes"].items()}
    totals["evaluation"] = {
        way: sum(counts[way] for counts in summary["evaluation_bytes"].values()) for way in ("up", "down")
    }
    roles = [role for role, counts in totals.items() if any(counts.values())]
    bars = [
        go.Bar(name=way, x=roles, y=[totals[role][way] / 1e6 for role in roles], marker_color=color)
        for way, color in zip(("up", "down"), COLORS, strict=False)
    ]
    return Chart(
        "Bytes on the wire",
        "All clients together; up is from a client to the server. Evaluation is counted apart from training.",
        bars if roles else [],
        axes("", "MB", barmode="group"),
    )


def _traffic_of_runs(summaries: Mapping[str, Mapping[str, Any]]) -> Chart:
    """Draw megabytes of training by run, stacked by role."""
    names, roles = list(map(plain, summaries)), next(iter(summaries.values()))["bytes"]
    totals = {
        role: [sum(summary["bytes"][role].values()) / 1e6 for summary in summaries.values()] for role in roles
    }
    bars = [
        go.Bar(name=role, x=names, y=total, marker_color=color)
        for color, (role, total) in zip(COLORS, totals.items(), strict=False)
        if any(total)
    ]
    caption = "Of training, both directions, all clients together; evaluation is left out."
    return Chart("Bytes on the wire", caption, bars, axes("", "MB", barmode="stack"))


def seconds_by_leg(summaries: Mapping[str, Mapping[str, Any]]) -> Chart:
    """Draw the wall time of the steps, one bar for each leg and run."""
    bars = [
        go.Bar(
            name=plain(name),
            y=[leg.replace("_", " ") for leg in summary["seconds_by_leg"]],
            x=list(summary["seconds_by_leg"].values()),
            orientation="h",
            marker_color=COLORS[index % MAX_COLORED],
        )
        for index, (name, summary) in enumerate(summaries.items())
        if summary["seconds_by_leg"]
    ]
    layout = axes("seconds", "", barmode="group", hovermode="y").update(yaxis=NAMES_DOWNWARD)
    return Chart(
        "Seconds by leg", "Wall time of the training steps, summed over clients and rounds.", bars, layout
    )


def aggregation_error(summaries: Mapping[str, Mapping[str, Any]]) -> Chart:
    """Draw the distance of the global adapters from the mean of the clients' updates, by round."""
    lines = {name: _by_round(summary["aggregation_error"], first=1) for name, summary in summaries.items()}
    rounds = max(len(xs) for xs, _ in lines.values())
    return Chart(
        "Aggregation error",
        "Lost when the clients' updates become one adapter: ‖mean(BA) − BA‖ / ‖mean(BA)‖; 0 is exact.",
        _lines(lines, markers=True),
        axes("round", "relative error", rounds, yaxis_rangemode="tozero"),
    )


def mean_by_step(steps: Iterable[StepDone]) -> Series:
    """Return the token-weighted mean loss, at each step, of the clients that took it."""
    sums: defaultdict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for step in steps:
        if step.loss is not None and math.isfinite(step.loss):
            sums[step.step][0] += step.loss * step.tokens
            sums[step.step][1] += step.tokens
    means = {number: total / tokens for number, (total, tokens) in sorted(sums.items()) if tokens}
    return list(means), list(means.values())


def thinned(series: Series, most: int = MAX_POINTS) -> Series:
    """Return a series of at most `most` points: means over equal windows of neighbors."""
    xs, ys = series
    window = math.ceil(len(xs) / most)
    if window <= 1:
        return series
    starts = range(0, len(xs), window)
    known = [
        [y for y in ys[start : start + window] if y is not None and math.isfinite(y)] for start in starts
    ]
    return [xs[start] for start in starts], [sum(part) / len(part) if part else None for part in known]


def _lines(lines: Mapping[str, Series], bold: Series | None = None, markers: bool = False) -> list[Trace]:
    """Return one trace for each name; `bold`, the mean of all, is drawn last and in ink."""
    crowd = len(lines) > MAX_COLORED
    traces = []
    for index, (name, series) in enumerate(lines.items()):
        color, width = (FAINT, 1.0) if crowd else (COLORS[index % MAX_COLORED], 1.6)
        trace = _line(name, series, color, width, markers and not crowd)
        traces.append(trace.update(showlegend=bool(name) and not crowd))
    if bold is not None and len(lines) > 1:
        traces.append(_line(ALL, bold, INK, 3, markers))
    return [trace for trace in traces if any(y is not None for y in trace.y)]


def _line(name: str, series: Series, color: str, width: float, markers: bool) -> Trace:
    xs, ys = thinned(series)
    return go.Scatter(
        mode="lines+markers" if markers else "lines",
        name=plain(name),
        x=list(xs),
        y=[None if y is None or not math.isfinite(y) else round(y, 6) for y in ys],
        line={"color": color, "width": width},
        marker={"color": color, "size": 5 + width},
    )


NAMES_DOWNWARD = {"autorange": "reversed", "automargin": True, "showgrid": False}
"""An axis of names, the first one on top."""


def axes(x: str, y: str, rounds: int = 0, **others: Any) -> Any:
    """Return a layout with the titles of both axes; rounds are whole numbers, with a dozen ticks at most."""
    xaxis: dict[str, Any] = {"title": {"text": x}}
    if rounds:
        xaxis |= {"tickformat": "d", "dtick": math.ceil(rounds / 12)}
    if not x:  # an axis of names
        xaxis["showgrid"] = False
    return go.Layout(xaxis=xaxis, yaxis={"title": {"text": y}}).update(others)


def _by_round(values: Sequence[float | None], first: int) -> Series:
    return list(range(first, first + len(values))), values


def _steps(events: Iterable[Event]) -> list[StepDone]:
    return [event for event in events if isinstance(event, StepDone)]


def plain(name: str) -> str:
    """Escape a name so that plotly shows it as it is."""
    return html.escape(name, quote=False)
