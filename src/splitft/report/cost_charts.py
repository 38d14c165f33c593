"""Held-out loss against what it cost: simulated seconds and MB; one line a run, or a band over seeds.

{name: course} --against_costs--> two charts of lines
{method: [course of each seed]} --with_bands--> three charts: rounds, simulated seconds, MB

loss  ▒▒▒╲
         ▒▒▒╲▒▒▒                 line: mean over seeds; band: lowest to highest seed
             ╲__________ MB
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from splitft.report.charts import COLOURS, LEGIBLE, Chart, plain, titled_axes
from splitft.tracking.history import Point

DASHES = ("solid", "dash", "dot")
"""Lines beyond the number of colours differ in their dashes."""
TARGET_LINE = {"color": "faint", "width": 1, "dash": "dot"}
NATS = "nats per token"


def against_costs(courses: Mapping[str, Sequence[Point]]) -> list[Chart]:
    """Loss against simulated seconds and against MB, a line each run."""
    lines = {name: [points] for name, points in courses.items()}
    return [chart for chart in with_bands(lines)[1:] if chart.data]


def with_bands(courses: Mapping[str, Sequence[Sequence[Point]]], target: float | None = None) -> list[Chart]:
    """Loss against rounds, simulated seconds and MB: mean over each method's seeds, and their range."""
    several = max((len(seeds) for seeds in courses.values()), default=0) > 1
    how = "Lines are means over seeds, bands reach from the lowest to the highest." if several else ""
    rounds = max((len(points) for seeds in courses.values() for points in seeds), default=0)
    costs: list[tuple[str, str, str, Callable[[Point], float | None], int]] = [
        ("Loss by round", "Held-out loss after each round.", "round", lambda point: point.round, rounds),
        (
            "Loss by simulated time",
            "What counts where machines and links are slow.",
            "seconds on the simulated clock",
            lambda point: point.simulated_s,
            0,
        ),
        ("Loss by traffic", "What counts where bytes are dear.", "MB sent in training", lambda p: p.mb, 0),
    ]
    return [
        Chart(
            title,
            f"{caption} {how}".strip(),
            _traces(courses, cost, target),
            {"hovermode": "closest", **titled_axes(axis, NATS, whole)},
        )
        for title, caption, axis, cost, whole in costs
    ]


def simulated_by_round(summaries: Mapping[str, Mapping[str, Any]]) -> list[Chart]:
    """Simulated seconds of each round, a line each run; nothing without a simulated clock."""
    timed = {name: one["simulated"]["seconds"] for name, one in summaries.items() if one["simulated"]}
    data = [
        _trace(name, range(1, len(seconds) + 1), seconds, _line(place))
        for place, (name, seconds) in enumerate(timed.items())
    ]
    axes = titled_axes("round", "seconds", max((len(one) for one in timed.values()), default=0))
    axes["yaxis"] |= {"rangemode": "tozero"}
    caption = "Length of each round on the simulated clock, moving of blocks included."
    chart = Chart("Simulated seconds by round", caption, data, axes)
    return [chart] if data else []


def _traces(
    courses: Mapping[str, Sequence[Sequence[Point]]],
    cost: Callable[[Point], float | None],
    target: float | None,
) -> list[dict[str, Any]]:
    """A line a name, with its band beneath if there are several seeds, and the target across."""
    bands, lines, reach = [], [], []
    for place, (name, seeds) in enumerate(courses.items()):
        xs, losses = _means(seeds, cost)
        if not xs:
            continue
        if len(seeds) > 1:
            bands.append(_band(name, place, xs, losses))
        means = [sum(each) / len(each) for each in losses]
        lines.append(_trace(name, xs, means, _line(place)) | {"marker": {"color": _colour(place), "size": 6}})
        reach += xs
    if target is not None and reach:
        across = _trace("target", [min(reach), max(reach)], [target] * 2, TARGET_LINE)
        lines.append(across | {"mode": "lines", "hoverinfo": "skip"})
    return [*bands, *lines]


def _means(
    seeds: Sequence[Sequence[Point]], cost: Callable[[Point], float | None]
) -> tuple[list[float], list[list[float]]]:
    """For each round that all seeds have: the mean cost until then, and every seed's loss."""
    xs, losses = [], []
    for points in _rounds_of_all(seeds):
        known = [spent for spent in map(cost, points) if spent is not None]
        if len(known) == len(points):
            xs.append(round(sum(known) / len(known), 6))
            losses.append([point.loss for point in points])
    return xs, losses


def _trace(name: str, xs: Sequence[float], ys: Sequence[float], line: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": plain(name),
        "legendgroup": plain(name),
        "x": list(xs),
        "y": [round(y, 6) for y in ys],
        "line": line,
    }


def _band(name: str, place: int, xs: Sequence[float], losses: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The area between the lowest and the highest seed: along the lows and back along the highs."""
    around = [*map(min, losses), *reversed(list(map(max, losses)))]
    outline = {"width": 0, "color": _colour(place)}
    return _trace(name, [*xs, *reversed(xs)], around, outline) | {
        "mode": "lines",
        "fill": "toself",
        "fillcolor": _pale(_colour(place)),
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _rounds_of_all(seeds: Sequence[Sequence[Point]]) -> list[list[Point]]:
    """For each round that every seed has been evaluated after, the seeds' points."""
    by_round = [{point.round: point for point in points} for points in seeds]
    shared = sorted(set.intersection(*(set(one) for one in by_round))) if by_round else []
    return [[one[number] for one in by_round] for number in shared]


def _colour(place: int) -> str:
    return COLOURS[place % LEGIBLE]


def _line(place: int) -> dict[str, Any]:
    return {"color": _colour(place), "width": 2, "dash": DASHES[place // LEGIBLE % len(DASHES)]}


def _pale(colour: str) -> str:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.16)"
