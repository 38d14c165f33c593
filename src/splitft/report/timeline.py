"""The simulated clock in charts: one round as a Gantt chart, and where the seconds of all rounds went.

    [RoundTimed, ...] --of_the_clock--> [Chart, ...]
                      --machine_rows--> who, idle, machine

    ann     |down|forward| up |wait |==server==|down|head| ...        a row each client and the server,
    server          |  bob  |   ann    |                              a colour each leg

The first round is recorded bar by bar, and those in which cuts moved; the last of them is drawn, or its
beginning.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from splitft.report.charts import COLOURS, Chart, plain, titled_axes
from splitft.tracking.events import Bar, RoundTimed

SERVER = "server"
"""How bars and idle seconds call the server."""
MOST_CLIENTS = 20
"""Rows of clients in a Gantt chart; the others are left out of it."""
BARS_A_ROW = 40
"""Bars a row, on average, that a Gantt chart begins with; what comes later is left out of it."""

LEG_COLOURS = {
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
    "wait": "faint",
}
"""Legs in the order of a step. A client computes in blue, the server in violet; up is orange, down green."""
PALE = {"wait": 0.35}
"""Opacity of legs in which nothing is done."""

LEGEND = {"yref": "container", "y": 0.01, "yanchor": "bottom", "traceorder": "normal"}
"""At the bottom, however high the drawing and however many its lines."""

MACHINE_HEADINGS = ("who", "idle", "machine")
"""Columns of `machine_rows`."""


def of_the_clock(timed: Sequence[RoundTimed]) -> list[Chart]:
    """All charts of the simulated clock that have something to show."""
    charts = [one_round(timed), seconds_by_round(timed), seconds_by_client(timed)]
    return [chart for chart in charts if chart.data]


def one_round(timed: Sequence[RoundTimed]) -> Chart:
    """Who did what and when in the last round that was recorded bar by bar."""
    told = next((event for event in reversed(timed) if event.bars), None)
    if told is None:
        return Chart("One round", "", [])
    everyone = list(told.legs)
    rows = [*everyone[:MOST_CLIENTS], SERVER]
    bars = [bar for bar in told.bars if bar.who in rows]
    shown, until = _beginning(bars, BARS_A_ROW * len(rows))
    caption = f"Round {told.round}: who does what, and when."
    if len(shown) < len(bars):
        whole = _seconds(told.seconds - told.move_seconds)
        caption += f" Shown is its beginning, {_seconds(until)} of {whole}{_steps_within(bars, until)}."
    if len(rows) <= len(everyone):
        caption += f" Shown are the first {MOST_CLIENTS} of {len(everyone)} clients."
    if told.move_seconds:
        caption += f" Before it, blocks moved for {_seconds(told.move_seconds)}."
    by_leg: defaultdict[str, list[Bar]] = defaultdict(list)
    for bar in shown:
        by_leg[bar.leg].append(bar)
    data = [
        _bars(leg)
        | {
            "y": [plain(bar.who) for bar in by_leg[leg]],
            "base": [round(bar.start, 6) for bar in by_leg[leg]],
            "x": [round(min(bar.end, until) - bar.start, 6) for bar in by_leg[leg]],
            "customdata": [round(bar.end, 6) for bar in by_leg[leg]],
            "hovertemplate": "%{y}, " + plain(_words(leg)) + "<br>%{base:.4~g} to %{customdata:.4~g} s",
        }
        for leg in _in_order(by_leg)
    ]
    height = 130 + 30 * len(rows)
    layout = _rows_layout(rows) | {"barmode": "overlay", "hovermode": "closest"}
    return Chart("One round", caption, data, layout, wide=True, height=height)


def seconds_by_round(timed: Sequence[RoundTimed]) -> Chart:
    """How long each round took, and how much of it was moving blocks."""
    rounds = [event.round for event in timed]
    parts = {
        "the round": ([event.seconds - event.move_seconds for event in timed], COLOURS[0]),
        "moving blocks": ([event.move_seconds for event in timed], COLOURS[1]),
    }
    data: list[dict[str, Any]] = [
        {"type": "bar", "name": name, "x": rounds, "y": seconds, "marker": {"color": colour}}
        for name, (seconds, colour) in parts.items()
        if any(seconds)
    ]
    loaded = sum(event.weight_bytes for event in timed)
    caption = "From the first block that moves to the last client's adapters."
    if loaded:
        caption += f" For deeper cuts, clients loaded {loaded / 1e6:,.1f} MB of base weights."
    axes = titled_axes("round", "seconds", len(rounds))
    return Chart("Seconds by round", caption, data, {"barmode": "stack", "showlegend": len(data) > 1, **axes})


def seconds_by_client(timed: Sequence[RoundTimed]) -> Chart:
    """On which leg each client spent its seconds, over all rounds."""
    total: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in timed:
        for client, seconds in event.legs.items():
            for leg, spent in seconds.items():
                total[leg][client] += spent
    clients = list(dict.fromkeys(client for event in timed for client in event.legs))
    data = [
        _bars(leg)
        | {
            "y": [plain(client) for client in clients],
            "x": [round(total[leg][client], 6) for client in clients],
            "hovertemplate": "%{y}, " + plain(_words(leg)) + "<br>%{x:.4~g} s",
        }
        for leg in _in_order(total)
    ]
    height = max(360, 190 + 18 * len(clients))
    layout = _rows_layout(clients) | {"barmode": "stack", "hovermode": "closest"}
    caption = "All rounds together; wait is for the server or the link while another has it."
    return Chart("Seconds by leg and client", caption, data, layout, height=height)


def machine_rows(timed: Sequence[RoundTimed], machines: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """One row for each client and the server: the share of its rounds in which it was idle, its machine."""
    names = dict.fromkeys([*machines, *(who for event in timed for who in event.idle)])
    for who in names:
        own = [event for event in timed if who in event.idle]
        whole = sum(event.seconds - event.move_seconds for event in own)
        idle = sum(event.idle[who] for event in own)
        yield who, f"{100 * idle / whole:.1f} %" if whole else "–", machines.get(who, "–")


def _beginning(bars: Sequence[Bar], most: int) -> tuple[list[Bar], float]:
    """At most `most` bars, those that start first, and until when they tell all there is."""
    if len(bars) <= most:
        return list(bars), max((bar.end for bar in bars), default=0.0)
    ordered = sorted(bars, key=lambda bar: bar.start)
    until = ordered[most].start
    return [bar for bar in ordered[:most] if bar.start < until], until


def _steps_within(bars: Sequence[Bar], until: float) -> str:
    """How many steps the clients have done by then, in words; nothing where no client goes backward."""
    steps: defaultdict[str, list[bool]] = defaultdict(list)
    for bar in bars:
        if bar.leg == "client_backward":
            steps[bar.who].append(bar.end <= until)
    if not steps:
        return ""
    done = sorted({sum(ended) for ended in steps.values()})
    span = str(done[0]) if len(done) == 1 else f"{done[0]} to {done[-1]}"
    return f", in which each client does {span} of {max(map(len, steps.values()))} steps"


def _bars(leg: str) -> dict[str, Any]:
    """A trace of horizontal bars in the leg's colour; a hairline keeps the shortest visible."""
    colour = LEG_COLOURS.get(leg, COLOURS[-1])
    marker = {"color": colour, "opacity": PALE.get(leg, 1.0), "line": {"color": colour, "width": 0.5}}
    return {"type": "bar", "orientation": "h", "name": plain(_words(leg)), "marker": marker}


def _rows_layout(names: Sequence[str]) -> dict[str, Any]:
    """Axes of seconds and of names, the first name on top."""
    rows = [plain(name) for name in names]
    yaxis = {
        "type": "category", "categoryorder": "array", "categoryarray": rows, "autorange": "reversed",
        "automargin": True, "showgrid": False,
    }  # fmt: skip
    return {"bargap": 0.25, "legend": LEGEND, "xaxis": {"ticksuffix": " s"}, "yaxis": yaxis}


def _in_order(legs: Mapping[str, Any]) -> list[str]:
    """Legs in the order of a step; unknown ones come last."""
    known = list(LEG_COLOURS)
    return sorted(legs, key=lambda leg: known.index(leg) if leg in known else len(known))


def _words(leg: str) -> str:
    return leg.replace("_", " ")


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"
