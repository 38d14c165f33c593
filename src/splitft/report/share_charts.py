"""The clients' shares of the text: tables, bars and heat maps.

    SharesReport.to_json() --share_table, label_table--> Table
                           --shares_page--> one self-contained HTML page

    client     examples  tokens  shortest  25 %  50 %  75 %  longest  lengths
    client-1        120   8,087        12    40    66    91      127  ▁▁▂▃▅█▇▆

A bar of `lengths` is one length class; its height is the share of the client's examples in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from splitft.report.charts import COLORS, NAMES_DOWNWARD, Chart, axes, plain
from splitft.report.page import render
from splitft.specs.data import PARTITIONS
from splitft.tracking.table import Table

BARS = "▁▂▃▄▅▆▇█"
MAX_LABELS = 12
"""Labels shown one by one, those with most examples; the others are counted together."""
OTHERS = "others"


def share_table(shares: Mapping[str, Any]) -> Table:
    """Return one row for each client: examples, tokens, lengths, and a bar chart of the lengths."""
    summary = shares["summary"]
    keys = ("examples", "tokens", "quartiles", "histograms")
    rows = [
        (name, f"{examples:,}", f"{tokens:,}", *(f"{length:,}" for length in quartiles), bars(histogram))
        for name, examples, tokens, quartiles, histogram in zip(
            shares["names"], *(summary[key] for key in keys), strict=True
        )
    ]
    headings = ("client", "examples", "tokens", "shortest", "25 %", "50 %", "75 %", "longest", "lengths")
    return Table(headings, rows, "lrrrrrrrl")


def label_table(shares: Mapping[str, Any]) -> Table | None:
    """Return the examples of each label, one column a client; None if the text has no labels."""
    labels, counts = label_columns(shares)
    rows = [(label, *(f"{row[index]:,}" for row in counts)) for index, label in enumerate(labels)]
    return Table((str(shares["spec"]["column"]), *shares["names"]), rows) if rows else None


def label_columns(shares: Mapping[str, Any]) -> tuple[list[str], list[list[int]]]:
    """Return the labels with most examples, then all others as one, and each client's counts of them."""
    summary = shares["summary"]
    labels, counts = list(summary["labels"]), [list(row) for row in summary["label_counts"]]
    if len(labels) <= MAX_LABELS:
        return labels, counts
    totals = [sum(row[index] for row in counts) for index in range(len(labels))]
    most = sorted(sorted(range(len(labels)), key=lambda index: -totals[index])[: MAX_LABELS - 1])
    shown = [[*(row[index] for index in most), sum(row) - sum(row[i] for i in most)] for row in counts]
    return [*(labels[index] for index in most), OTHERS], shown


def bars(counts: Sequence[int]) -> str:
    """Return counts as a row of bars, the highest for the largest count, and a dot for zero."""
    most = max(counts, default=0)
    return "".join(BARS[(len(BARS) * count - 1) // most] if count else "·" for count in counts)


def division_sentence(shares: Mapping[str, Any]) -> str:
    """Describe the division in one sentence."""
    spec = shares["spec"]
    how = (PARTITIONS[spec["by"]].description if spec["by"] in PARTITIONS else "by {by}").format(**spec)
    total, clients = sum(shares["summary"]["examples"]), len(shares["names"])
    lost = f"; {shares['truncated']:,} cut off, {shares['dropped']:,} left out"
    return f"{shares['source']}: {total:,} examples to {clients} clients, {how}, seed {shares['seed']}{lost}."


def distance_sentences(shares: Mapping[str, Any]) -> list[str]:
    """Describe how unequal the shares are: one sentence on lengths and, if there are any, one on labels."""
    summary = shares["summary"]
    distance = "mean Jensen-Shannon distance between clients"
    sentences = [
        f"Lengths: {distance} {summary['length_distance']:.3f} "
        f"(0 alike, 1 disjoint; {summary['chance_distance']:.3f} by chance at these sizes)."
    ]
    if summary["label_distance"] is not None:
        sentences.append(f"{shares['spec']['column']}: {distance} {summary['label_distance']:.3f}.")
    return sentences


def shares_page(shares: Mapping[str, Any]) -> str:
    """Return the page."""
    return render(
        "report/templates/shares.html.j2",
        title="Who gets which text",
        division=division_sentence(shares),
        distances=distance_sentences(shares),
        table=share_table(shares),
        charts=share_charts(shares),
    )


def share_charts(shares: Mapping[str, Any]) -> list[Chart]:
    """Draw tokens of each client, and heat maps of its lengths and labels."""
    summary, names = shares["summary"], [plain(name) for name in shares["names"]]
    bins = [f"{low}" if low == high else f"{low}–{high}" for low, high in summary["bins"]]
    labels, counts = label_columns(shares)
    charts = [
        Chart(
            "Tokens by client",
            "What each client trains and is evaluated on, after truncation.",
            [go.Bar(x=names, y=list(summary["tokens"]), marker_color=COLORS[0])],
            axes("", "tokens"),
        ),
        Chart(
            "Lengths",
            "Share of a client's examples in each length class (tokens); equal rows are equal clients.",
            [_heat_map(names, bins, summary["histograms"])],
            _heat_map_axes("tokens of an example"),
            height=150 + 26 * len(names),
        ),
        Chart(
            f"Labels ({shares['spec']['column']})",
            "Share of a client's examples with each label.",
            [_heat_map(names, labels, counts)],
            _heat_map_axes(""),
            height=150 + 26 * len(names),
        ),
    ]
    return charts if labels else charts[:2]


def _heat_map(names: Sequence[str], columns: Sequence[str], counts: Sequence[Sequence[int]]) -> Any:
    """Return clients by classes: each row's counts as shares of the row."""
    return go.Heatmap(
        x=[plain(column) for column in columns],
        y=list(names),
        z=[[round(count / max(sum(row), 1), 4) for count in row] for row in counts],
        customdata=[list(row) for row in counts],
        hovertemplate="%{y}, %{x}<br>%{customdata} examples, %{z:.1%}<extra></extra>",
        colorscale=[[0, "rgba(47, 111, 174, 0.04)"], [1, COLORS[0]]],  # pale in the light and in the dark
        zmin=0,
    )


def _heat_map_axes(x: str) -> Any:
    xaxis = {"type": "category", "showgrid": False}
    return axes(x, "", hovermode="closest").update(xaxis=xaxis, yaxis={"type": "category"} | NAMES_DOWNWARD)
