"""Held-out loss against its cost: rounds, simulated seconds and MB.

{run: history} --loss_against_costs--> two charts, one line a run
{method: [history of each seed]} --loss_with_bands--> three charts, one line a method, its range over seeds

loss  ▒▒▒╲
         ▒▒▒╲▒▒▒                 line: mean over seeds; band: lowest to highest seed
             ╲__________ MB
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from splitft.report.charts import COLORS, FAINT, MAX_COLORED, Chart, Trace, axes, plain
from splitft.tracking.history import Point

History = Sequence[Point]
Cost = Callable[[Point], float | None]

DASHES = ("solid", "dash", "dot")
"""Lines beyond the number of colors differ in their dashes."""
TARGET_LINE = {"color": FAINT, "width": 1, "dash": "dot"}
COSTS: Sequence[tuple[str, str, str, Cost]] = (
    ("Loss by round", "Held-out loss after each round.", "round", lambda point: point.round),
    (
        "Loss by simulated time",
        "It matters where machines and links are slow.",
        "seconds on the simulated clock",
        lambda point: point.simulated_s,
    ),
    ("Loss by traffic", "It matters where bandwidth is dear.", "MB sent in training", lambda point: point.mb),
)
"""Title, caption, axis and value of each cost."""


def loss_against_costs(histories: Mapping[str, History]) -> list[Chart]:
    """Draw loss against simulated seconds and against MB, one line for each run."""
    lines = {name: [points] for name, points in histories.items()}
    return [chart for chart in loss_with_bands(lines)[1:] if chart.data]


def loss_with_bands(histories: Mapping[str, Sequence[History]], target: float | None = None) -> list[Chart]:
    """Draw loss against each cost: the mean over each method's seeds, and their range."""
    several = max((len(seeds) for seeds in histories.values()), default=0) > 1
    how = "Lines are means over seeds, bands reach from the lowest to the highest." if several else ""
    rounds = max((len(points) for seeds in histories.values() for points in seeds), default=0)
    return [
        Chart(
            title,
            f"{caption} {how}".strip(),
            _traces(histories, cost, target),
            axes(axis, "nats per token", rounds if axis == "round" else 0, hovermode="closest"),
        )
        for title, caption, axis, cost in COSTS
    ]


def accuracy_by_round(histories: Mapping[str, Sequence[History]]) -> list[Chart]:
    """Draw the token accuracy of each method after each round, means over seeds; empty if it is not known."""
    lines, most = [], 0
    for index, (name, seeds) in enumerate(histories.items()):
        by_round = [
            {point.round: point.accuracy for point in points if point.accuracy is not None}
            for points in seeds
        ]
        shared = sorted(set.intersection(*map(set, by_round)))
        means = {number: sum(one[number] for one in by_round) / len(by_round) for number in shared}
        if means:
            lines.append(_line(name, list(means), list(means.values()), _style(index)))
            most = max(most, len(means))
    layout = axes("round", "share of tokens", most, hovermode="closest")
    caption = "Share of the held-out tokens that are the most probable ones, after each round."
    return [Chart("Token accuracy by round", caption, lines, layout)] if lines else []


def simulated_by_round(summaries: Mapping[str, Mapping[str, Any]]) -> list[Chart]:
    """Draw the simulated seconds of each round, one line for each run; empty without a simulated clock."""
    timed = {name: one["simulated"]["seconds"] for name, one in summaries.items() if one["simulated"]}
    if not timed:
        return []
    lines = [
        _line(name, range(1, len(seconds) + 1), seconds, _style(index))
        for index, (name, seconds) in enumerate(timed.items())
    ]
    layout = axes("round", "seconds", max(map(len, timed.values())), yaxis_rangemode="tozero")
    caption = "Length of each round on the simulated clock, moving of blocks included."
    return [Chart("Simulated seconds by round", caption, lines, layout)]


def _traces(histories: Mapping[str, Sequence[History]], cost: Cost, target: float | None) -> list[Trace]:
    """Return one line for each name, with a band beneath it for several seeds, and the target across."""
    bands, lines, reach = [], [], []
    for index, (name, seeds) in enumerate(histories.items()):
        xs, losses = _costs_and_losses(seeds, cost)
        if not xs:
            continue
        if len(seeds) > 1:
            bands.append(_band(name, index, xs, losses))
        means = [sum(each) / len(each) for each in losses]
        lines.append(_line(name, xs, means, _style(index)).update(marker={"color": _color(index), "size": 6}))
        reach += xs
    if target is not None and reach:
        across = _line("target", [min(reach), max(reach)], [target] * 2, TARGET_LINE)
        lines.append(across.update(mode="lines", hoverinfo="skip"))
    return [*bands, *lines]


def _costs_and_losses(seeds: Sequence[History], cost: Cost) -> tuple[list[float], list[list[float]]]:
    """Return, for each round that all seeds have, the mean cost until then and every seed's loss."""
    by_round = [{point.round: point for point in points} for points in seeds]
    shared = sorted(set.intersection(*map(set, by_round))) if by_round else []
    xs, losses = [], []
    for number in shared:
        points = [one[number] for one in by_round]
        known = [spent for spent in map(cost, points) if spent is not None]
        if len(known) == len(points):
            xs.append(round(sum(known) / len(known), 6))
            losses.append([point.loss for point in points])
    return xs, losses


def _line(name: str, xs: Sequence[float], ys: Sequence[float], style: Mapping[str, Any]) -> Trace:
    return go.Scatter(
        mode="lines+markers",
        name=plain(name),
        legendgroup=plain(name),
        x=list(xs),
        y=[round(y, 6) for y in ys],
        line=style,
    )


def _band(name: str, index: int, xs: Sequence[float], losses: Sequence[Sequence[float]]) -> Trace:
    """Return the area between the lowest and the highest seed: along the lows and back along the highs."""
    around = [*map(min, losses), *reversed(list(map(max, losses)))]
    red, green, blue = (int(_color(index)[start : start + 2], 16) for start in (1, 3, 5))
    return _line(name, [*xs, *reversed(xs)], around, {"width": 0, "color": _color(index)}).update(
        mode="lines",
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.16)",
        hoverinfo="skip",
        showlegend=False,
    )


def _color(index: int) -> str:
    return COLORS[index % MAX_COLORED]


def _style(index: int) -> dict[str, Any]:
    return {"color": _color(index), "width": 2, "dash": DASHES[index // MAX_COLORED % len(DASHES)]}
