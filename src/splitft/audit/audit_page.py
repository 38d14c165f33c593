"""Show an audit on the terminal and as an HTML page: a table, recovery against cost, and the verdicts.

    Audit.to_json() --short_table--> terminal    --leak_table, charts, audit.html.j2--> page

 cut codec noise perplexity attack        of         tokens read   names, numbers whole texts
   2 bf16      0      +0.0% matching      all tokens 100.0% ± 0.0%           100%        100%
                            head gradient labels     100.0% ± 0.0%           100%        100%

The page and `leak_table` also have function words and ROUGE-L, which do not fit into 80 columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from splitft.report.charts import Chart, axes, plain
from splitft.report.page import render
from splitft.tracking.table import Table

HEADINGS = (
    "cut", "codec", "noise", "attack", "reads", "tokens", "names, numbers", "function words", "whole texts",
    "ROUGE-L", "perplexity",
)  # fmt: skip
"""Columns of `leak_table`."""
SHORT_HEADINGS = (
    "cut", "codec", "noise", "perplexity", "attack", "of", "tokens read", "names,\nnumbers", "whole\ntexts",
)  # fmt: skip
"""Columns of `short_table`."""
LEAST_COST = 1e-3
"""Least cost on the logarithmic axis: 0.1 %."""


def leak_table(data: Mapping[str, Any]) -> Table:
    """Return one row for each setting and attack, with all columns."""
    return Table(HEADINGS, [_cells(row) for row in data["rows"]], align="rlrllrrrrrr")


def short_table(data: Mapping[str, Any]) -> Table:
    """Return the rows in 80 columns, each setting named once and its strongest attack in bold."""
    rows, before = [], None
    for row in data["rows"]:
        cut, codec, noise, attack, reads, tokens, rare, _, whole, _, perplexity = _cells(row)
        setting = (cut, codec, noise, perplexity)
        rows.append((*(setting if setting != before else ("",) * 4), attack, reads, tokens, rare, whole))
        before = setting
    return Table(SHORT_HEADINGS, rows, align="rlrrllrrr", bold=_strongest(data["rows"]), gap=1)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        str(row["cut"]),
        row["codec"],
        f"{row['noise']:g}",
        row["attack"],
        "all tokens" if row["way"] == "hidden" else "labels",
        f"{row['tokens']:.1%} ± {row['standard_error']:.1%}",
        _percent(row["rare"]),
        _percent(row["function"]),
        _percent(row["sentences"]),
        f"{row['rouge_l']:.3f}",
        rise(row["perplexity_cost"]),
    )


def rise(cost: float) -> str:
    """Format a relative rise of perplexity as +2.5%, or from twice as high on as x 4.1."""
    if cost < 1:
        return f"{cost:+.1%}"
    return f"x {1 + cost:.1f}" if cost < 99 else f"x {1 + cost:,.0f}"


def attacker_sentence(data: Mapping[str, Any]) -> str:
    """Say in two sentences what was attacked, with what, and how to read the cost."""
    return (
        f"{data['model']} on {data['text']}: the attacker has the public model, the global adapters, "
        f"{data['public']} to learn on, and the bytes that the server received; {data['seconds']:.0f} s. "
        "Perplexity is that of the model before it is trained with the noise: training recovers some of it."
    )


def audit_page(data: Mapping[str, Any]) -> str:
    """Return the page as HTML."""
    return render(
        "audit/audit.html.j2",
        title="What a split gives away",
        attacker=attacker_sentence(data),
        verdicts=data["verdicts"],
        charts=leak_charts(data),
        table=leak_table(data),
    )


def leak_charts(data: Mapping[str, Any]) -> list[Chart]:
    """Draw recovery against its cost in perplexity, and recovery by cut without noise."""
    by_cost: dict[str, set[tuple[float, float]]] = {}
    by_cut: dict[str, set[tuple[float, float]]] = {}
    for row in data["rows"]:
        if row["way"] == "hidden":
            cost = max(LEAST_COST, row["perplexity_cost"])
            by_cost.setdefault(row["attack"], set()).add((cost, row["tokens"]))
            if not row["noise"]:
                by_cut.setdefault(row["attack"], set()).add((row["cut"], row["tokens"]))
    return [
        Chart(
            "Recovery against cost",
            "Each point is a setting: noise, codec or cut. Down and to the left is better, and rare.",
            _traces(by_cost, "markers"),
            axes("rise of perplexity (0.05 is 5 %)", "tokens recovered", xaxis_type="log"),
        ),
        Chart(
            "Recovery by cut, without noise",
            "Tokens read off the hidden states.",
            _traces(by_cut, "lines+markers"),
            axes("cut", "tokens recovered"),
        ),
    ]


def _traces(points: Mapping[str, set[tuple[float, float]]], mode: str) -> list[Any]:
    return [
        go.Scatter(
            mode=mode, name=plain(name), x=[x for x, _ in sorted(found)], y=[y for _, y in sorted(found)]
        )
        for name, found in points.items()
    ]


def _strongest(rows: Sequence[Mapping[str, Any]]) -> set[int]:
    best: dict[tuple[object, ...], int] = {}
    for place, row in enumerate(rows):
        key = (row["cut"], row["codec"], row["noise"], row["gradient_noise"])
        if key not in best or row["tokens"] > rows[best[key]]["tokens"]:
            best[key] = place
    return set(best.values())


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
