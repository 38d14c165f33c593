"""The simulated clock in charts: one round as a Gantt chart, and the seconds of all rounds by leg.

    [RoundTimed, ...] --clock_charts--> [Chart, ...]
                      --machine_table--> Table: who, idle, machine

    ann     |down|forward| up |wait |==server==|down|head| ...        a row each client and the server,
    server          |  bob  |   ann    |                              a color each leg

The first round is recorded bar by bar, and so are those in which cuts moved. The last recorded round is
drawn; of a long one, its beginning.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from splitft.report.charts import COLORS, FAINT, NAMES_DOWNWARD, Chart, axes, plain
from splitft.tracking.events import Bar, RoundTimed
from splitft.tracking.table import Table

SERVER = "server"
"""Name of the server in bars and idle seconds."""
MAX_CLIENTS = 20
"""Rows of clients in a Gantt chart; later clients are left out."""
BARS_PER_ROW = 40
"""Mean number of bars in a row of a Gantt chart; later bars are left out."""

LEG_COLORS = {
    "adapters_down": "#2a9d9d",
    "client_forward": "#2f6fae",
    "up_hidden": "#e07b39",
    "server_forward": "#8e6bbf",
    "server_step": "#b39ad6",
    "down_hidden": "#3a9d5d",
    "head": "#7db4ea",
    "up_gradient": "#f0b184",
    "server_backward": "#5f3f94",
    "down_gradient": "#8cc9a1",
    "client_backward": "#1c4a7a",
    "adapters_up": "#a1714f",
    "wait": FAINT,
}
"""Legs in the order of a step. A client computes in blue, the server in violet; up is orange, down green."""
LEGEND = {"yref": "container", "y": 0.01, "yanchor": "bottom", "traceorder": "normal"}
"""At the bottom, however high the drawing and however many its lines."""


def clock_charts(timed: Sequence[RoundTimed]) -> list[Chart]:
    """Return all charts of the simulated clock that have something to show."""
    charts = [one_round(timed), seconds_by_round(timed), seconds_by_client(timed)]
    return [chart for chart in charts if chart.data]


def one_round(timed: Sequence[RoundTimed]) -> Chart:
    """Draw the last round that was recorded bar by bar: the legs of every client and of the server."""
    recorded = next((event for event in reversed(timed) if event.bars), None)
    if recorded is None:
        return Chart("One round", "", [])
    clients = list(recorded.legs)
    rows = [*clients[:MAX_CLIENTS], SERVER]
    bars = [bar for bar in recorded.bars if bar.who in rows]
    shown, until = _beginning(bars, BARS_PER_ROW * len(rows))
    # the caption says what is left out
    caption = f"Round {recorded.round}: who does what, and when."
    if len(shown) < len(bars):
        whole = _seconds(recorded.seconds - recorded.move_seconds)
        caption += f" Shown is its beginning, {_seconds(until)} of {whole}{_steps_within(bars, until)}."
    if len(rows) <= len(clients):
        caption += f" Shown are the first {MAX_CLIENTS} of {len(clients)} clients."
    if recorded.move_seconds:
        caption += f" Before it, blocks moved for {_seconds(recorded.move_seconds)}."
    # one trace for each leg, a bar for each time it was done
    by_leg: defaultdict[str, list[Bar]] = defaultdict(list)
    for bar in shown:
        by_leg[bar.leg].append(bar)
    data = [
        _bars(
            leg,
            "%{base:.4~g} to %{customdata:.4~g} s",
            y=[plain(bar.who) for bar in by_leg[leg]],
            base=[round(bar.start, 6) for bar in by_leg[leg]],
            x=[round(min(bar.end, until) - bar.start, 6) for bar in by_leg[leg]],
            customdata=[round(bar.end, 6) for bar in by_leg[leg]],
        )
        for leg in _in_order(by_leg)
    ]
    layout = _rows_layout(rows, barmode="overlay")
    return Chart("One round", caption, data, layout, wide=True, height=130 + 30 * len(rows))


def seconds_by_round(timed: Sequence[RoundTimed]) -> Chart:
    """Draw the length of each round, and the part of it in which blocks moved."""
    rounds = [event.round for event in timed]
    parts = {
        "the round": ([event.seconds - event.move_seconds for event in timed], COLORS[0]),
        "moving blocks": ([event.move_seconds for event in timed], COLORS[1]),
    }
    data = [
        go.Bar(name=name, x=rounds, y=seconds, marker_color=color)
        for name, (seconds, color) in parts.items()
        if any(seconds)
    ]
    loaded = sum(event.weight_bytes for event in timed)
    caption = "From the first block that moves to the last client's adapters."
    if loaded:
        caption += f" For deeper cuts, clients loaded {loaded / 1e6:,.1f} MB of base weights."
    layout = axes("round", "seconds", len(rounds), barmode="stack", showlegend=len(data) > 1)
    return Chart("Seconds by round", caption, data, layout)


def seconds_by_client(timed: Sequence[RoundTimed]) -> Chart:
    """Draw the seconds of each client by leg, over all rounds."""
    total: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in timed:
        for client, seconds in event.legs.items():
            for leg, spent in seconds.items():
                total[leg][client] += spent
    clients = list(dict.fromkeys(client for event in timed for client in event.legs))
    data = [
        _bars(
            leg,
            "%{x:.4~g} s",
            y=[plain(client) for client in clients],
            x=[round(total[leg][client], 6) for client in clients],
        )
        for leg in _in_order(total)
    ]
    layout = _rows_layout(clients, barmode="stack")
    caption = "All rounds together; wait is for the server or the link while another has it."
    return Chart("Seconds by leg and client", caption, data, layout, height=max(360, 190 + 18 * len(clients)))


def machine_table(timed: Sequence[RoundTimed], machines: Mapping[str, str]) -> Table:
    """Return a row for each client and the server: the idle share of its rounds, and its machine."""
    names = dict.fromkeys([*machines, *(who for event in timed for who in event.idle)])
    rows = []
    for who in names:
        own = [event for event in timed if who in event.idle]
        whole = sum(event.seconds - event.move_seconds for event in own)
        idle = sum(event.idle[who] for event in own)
        rows.append((who, f"{100 * idle / whole:.1f} %" if whole else "–", machines.get(who, "–")))
    return Table(("who", "idle", "machine"), rows, "lrl", wrap=(2,))


def _beginning(bars: Sequence[Bar], most: int) -> tuple[list[Bar], float]:
    """Return at most `most` bars, those that start first, and the time until which they are complete."""
    if len(bars) <= most:
        return list(bars), max((bar.end for bar in bars), default=0.0)
    ordered = sorted(bars, key=lambda bar: bar.start)
    until = ordered[most].start
    return [bar for bar in ordered[:most] if bar.start < until], until


def _steps_within(bars: Sequence[Bar], until: float) -> str:
    """Return, in words, how many steps the clients finish by then; empty where no client goes backward."""
    steps: defaultdict[str, list[bool]] = defaultdict(list)
    for bar in bars:
        if bar.leg == "client_backward":
            steps[bar.who].append(bar.end <= until)
    if not steps:
        return ""
    done = sorted({sum(ended) for ended in steps.values()})
    span = str(done[0]) if len(done) == 1 else f"{done[0]} to {done[-1]}"
    return f", in which each client does {span} of {max(map(len, steps.values()))} steps"


def _bars(leg: str, hover: str, **data: Any) -> Any:
    """Return a trace of horizontal bars in the leg's color; a hairline keeps the shortest visible."""
    color, name = LEG_COLORS.get(leg, COLORS[-1]), plain(leg.replace("_", " "))
    return go.Bar(
        name=name,
        orientation="h",
        marker={
            "color": color,
            "opacity": 0.35 if leg == "wait" else 1.0,
            "line": {"color": color, "width": 0.5},
        },
        hovertemplate=f"%{{y}}, {name}<br>{hover}",
        **data,
    )


def _rows_layout(names: Sequence[str], **others: Any) -> Any:
    """Return the axes of seconds and of names, the first name on top."""
    order = {"type": "category", "categoryorder": "array", "categoryarray": [plain(name) for name in names]}
    return go.Layout(
        bargap=0.25,
        legend=LEGEND,
        hovermode="closest",
        xaxis={"ticksuffix": " s"},
        yaxis=order | NAMES_DOWNWARD,
        **others,
    )


def _in_order(legs: Mapping[str, Any]) -> list[str]:
    """Return legs in the order of a step; unknown ones come last."""
    known = list(LEG_COLORS)
    return sorted(legs, key=lambda leg: known.index(leg) if leg in known else len(known))


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"
