"""Who gets which text, on the terminal and as a page: tables, bars and heat maps.

    SharesTold.to_json() --share_table, label_table--> rich tables
                         --shares_page--> one self-contained HTML page

    client     examples  tokens  shortest  25 %  50 %  75 %  longest  lengths
    client-1        120   8,087        12    40    66    91      127  ▁▁▂▃▅█▇▆

A bar of `lengths` is one length class; its height is the share of the client's examples in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from splitft.report.charts import COLOURS, Chart, plain, titled_axes
from splitft.report.markup import charts, table, text

BARS = "▁▂▃▄▅▆▇█"
HEADINGS = ("client", "examples", "tokens", "shortest", "25 %", "50 %", "75 %", "longest")
"""Columns of `share_rows`."""
MOST_LABELS = 12
"""Labels shown one by one, those with most examples; the others are counted together."""
OTHERS = "others"


def share_rows(told: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row of text a client: its examples, tokens and lengths."""
    summary = told["summary"]
    columns = (told["names"], summary["examples"], summary["tokens"], summary["quartiles"])
    return [
        (name, f"{examples:,}", f"{tokens:,}", *(f"{length:,}" for length in quartiles))
        for name, examples, tokens, quartiles in zip(*columns, strict=True)
    ]


def share_table(told: Mapping[str, Any]) -> Table:
    """The rows with a bar chart of each client's lengths."""
    shown = _table(*HEADINGS, "lengths")
    shown.columns[-1].justify = "left"
    for row, histogram in zip(share_rows(told), told["summary"]["histograms"], strict=True):
        shown.add_row(*map(escape, row), bars(histogram))
    return shown


def label_table(told: Mapping[str, Any]) -> Table | None:
    """Examples of each label, a column each client; None if the text carries no labels."""
    labels, counts = label_columns(told)
    if not labels:
        return None
    shown = _table(escape(str(told["spec"]["column"])), *map(escape, told["names"]))
    for place, label in enumerate(labels):
        shown.add_row(escape(label), *(f"{row[place]:,}" for row in counts))
    return shown


def label_columns(told: Mapping[str, Any]) -> tuple[list[str], list[list[int]]]:
    """The labels with most examples, then all others as one, and each client's counts of them."""
    summary = told["summary"]
    labels, counts = list(summary["labels"]), [list(row) for row in summary["label_counts"]]
    if len(labels) <= MOST_LABELS:
        return labels, counts
    totals = [sum(row[place] for row in counts) for place in range(len(labels))]
    most = sorted(sorted(range(len(labels)), key=lambda place: -totals[place])[: MOST_LABELS - 1])
    shown = [[*(row[place] for place in most), sum(row) - sum(row[p] for p in most)] for row in counts]
    return [*(labels[place] for place in most), OTHERS], shown


def bars(counts: Sequence[int]) -> str:
    """Counts as a row of bars, the highest being the largest count; a dot where there is none."""
    most = max(counts, default=0)
    return "".join(BARS[(len(BARS) * count - 1) // most] if count else "·" for count in counts)


def how_divided(told: Mapping[str, Any]) -> str:
    """The division in one sentence."""
    spec, clients = told["spec"], len(told["names"])
    how = {
        "length": f"by length, {spec['classes']} classes, Dirichlet {spec['alpha']:g}",
        "label": f"by {spec['column']}, Dirichlet {spec['alpha']:g}",
        "quantity": f"by quantity, Dirichlet {spec['alpha']:g}",
        "natural": f"one client for each {spec['column']}",
        "iid": "equal parts at random",
    }[spec["by"]]
    total = sum(told["summary"]["examples"])
    lost = f"; {told['truncated']:,} cut off, {told['dropped']:,} left out"
    return f"{told['source']}: {total:,} examples to {clients} clients, {how}, seed {told['seed']}{lost}."


def how_unequal(told: Mapping[str, Any]) -> list[str]:
    """One sentence each on lengths and, if there are any, labels."""
    summary = told["summary"]
    said = [
        f"Lengths: mean Jensen-Shannon distance between clients {summary['length_distance']:.3f} "
        f"(0 alike, 1 disjoint; {summary['chance_distance']:.3f} by chance at these sizes)."
    ]
    if summary["label_distance"] is not None:
        said.append(
            f"{told['spec']['column']}: mean Jensen-Shannon distance between clients "
            f"{summary['label_distance']:.3f}."
        )
    return said


def shares_body(told: Mapping[str, Any]) -> str:
    """The page's body."""
    sentences = "".join(f"<p class=facts>{text(said)}</p>\n" for said in how_unequal(told))
    return (
        f"<header>\n<p class=eyebrow>splitft shares</p>\n<h1>Who gets which text</h1>\n"
        f"<p class=facts>{text(how_divided(told))}</p>\n</header>\n{sentences}"
        f"{table(HEADINGS, share_rows(told))}<h2>In charts</h2>\n{charts(share_charts(told))}"
    )


def share_charts(told: Mapping[str, Any]) -> list[Chart]:
    """Tokens of each client, and heat maps of its lengths and labels."""
    summary = told["summary"]
    bins = [f"{low}" if low == high else f"{low}–{high}" for low, high in summary["bins"]]
    labels, counts = label_columns(told)
    drawn = [
        Chart(
            "Tokens by client",
            "What each client trains and is evaluated on, after truncation.",
            [
                {
                    "type": "bar",
                    "x": [plain(name) for name in told["names"]],
                    "y": list(summary["tokens"]),
                    "marker": {"color": COLOURS[0]},
                }
            ],
            titled_axes("", "tokens"),
        ),
        _heat_map(
            "Lengths",
            "Share of a client's examples in each length class (tokens); equal rows are equal clients.",
            told["names"],
            bins,
            summary["histograms"],
            "tokens of an example",
        ),
    ]
    if labels:
        title = f"Labels ({told['spec']['column']})"
        caption = "Share of a client's examples with each label."
        drawn.append(_heat_map(title, caption, told["names"], labels, counts, ""))
    return drawn


def _heat_map(
    title: str,
    caption: str,
    names: Sequence[str],
    columns: Sequence[str],
    counts: Sequence[Sequence[int]],
    axis: str,
) -> Chart:
    """Clients by classes: each row's counts as shares of the row."""
    trace = {
        "type": "heatmap",
        "x": [plain(column) for column in columns],
        "y": [plain(name) for name in names],
        "z": [[round(count / max(sum(row), 1), 4) for count in row] for row in counts],
        "customdata": [list(row) for row in counts],
        "hovertemplate": "%{y}, %{x}<br>%{customdata} examples, %{z:.1%}<extra></extra>",
        "colorscale": [[0, "rgba(47, 111, 174, 0.04)"], [1, COLOURS[0]]],  # pale in the light and in the dark
        "zmin": 0,
    }
    axes = titled_axes(axis, "")
    axes["xaxis"] |= {"type": "category", "showgrid": False}
    axes["yaxis"] |= {"type": "category", "autorange": "reversed", "automargin": True, "showgrid": False}
    height = 150 + 26 * len(names)
    return Chart(title, caption, [trace], {"hovermode": "closest", **axes}, height=height)


def _table(first: str, *others: str) -> Table:
    shown = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column(first)
    for heading in others:
        shown.add_column(heading, justify="right")
    return shown
