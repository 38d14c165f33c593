"""What an audit found, on the terminal and as a page: a table, recovery against cost, and the verdicts.

Audit.to_json() --leak_table--> rich table    --leaks_body--> the body of a self-contained page

 cut codec noise perplexity attack        of         tokens read   names, numbers whole texts
   2 bf16      0      +0.0% matching      all tokens 100.0% ± 0.0%           100%        100%
                            head gradient labels     100.0% ± 0.0%           100%        100%

The page and `leak_rows` have function words and ROUGE-L besides; 80 columns have no room for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from splitft.report.charts import Chart, titled_axes
from splitft.report.markup import charts, table, text

HEADINGS = (
    "cut", "codec", "noise", "attack", "reads", "tokens", "names, numbers", "function words", "whole texts",
    "ROUGE-L", "perplexity",
)  # fmt: skip
"""Columns of `leak_rows`."""
SHORT_HEADINGS = (
    "cut", "codec", "noise", "perplexity", "attack", "of", "tokens read", "names,\nnumbers", "whole\ntexts",
)  # fmt: skip
"""Columns of `leak_table`."""
LEAST_COST = 1e-3
"""Costs are drawn from here on, on a logarithmic axis: 0.1 %."""


def leak_rows(told: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row of text for each setting and attack."""
    return [
        (
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
        for row in told["rows"]
    ]


def rise(cost: float) -> str:
    """A rise of perplexity as people say it: +2.5%, and from twice as high on, x 4.1."""
    if cost < 1:
        return f"{cost:+.1%}"
    return f"x {1 + cost:.1f}" if cost < 99 else f"x {1 + cost:,.0f}"


def leak_table(told: Mapping[str, Any]) -> Table:
    """The rows in 80 columns, a setting told once; the strongest attack of each setting stands out."""
    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for heading in SHORT_HEADINGS:
        shown.add_column(heading, justify="left" if heading in ("codec", "attack", "of") else "right")
    strongest, before = _strongest(told["rows"]), None
    for place, row in enumerate(leak_rows(told)):
        cut, codec, noise, attack, reads, tokens, rare, _, whole, _, perplexity = map(escape, row)
        setting = (cut, codec, noise, perplexity)
        first = setting if setting != before else ("",) * len(setting)
        style = "bold" if place in strongest else ""
        shown.add_row(*first, attack, reads, tokens, rare, whole, style=style)
        before = setting
    return shown


def how_audited(told: Mapping[str, Any]) -> str:
    """What was attacked and what the attacker had, in one sentence."""
    return (
        f"{told['model']} on {told['text']}: the attacker has the public model, the global adapters, "
        f"{told['public']} to learn on, and the bytes that the server received; {told['seconds']:.0f} s. "
        "Perplexity is that of the model before it is trained with the noise: training wins some of it back."
    )


def leaks_body(told: Mapping[str, Any]) -> str:
    """The page's body."""
    said = "".join(f"<li>{text(sentence)}</li>\n" for sentence in told["verdicts"])
    return (
        f"<h1>What a split gives away</h1>\n<p>{text(how_audited(told))}</p>\n<ul>\n{said}</ul>\n"
        f"{charts(leak_charts(told))}{table(HEADINGS, leak_rows(told))}"
    )


def leak_charts(told: Mapping[str, Any]) -> list[Chart]:
    """Recovery against what it costs to lower it, and recovery by cut without noise."""
    rows = [row for row in told["rows"] if row["way"] == "hidden"]
    cost: dict[str, list[tuple[float, float]]] = {}
    depth: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        point = (max(LEAST_COST, row["perplexity_cost"]), row["tokens"])
        cost.setdefault(row["attack"], []).append(point)
        if not row["noise"]:
            depth.setdefault(row["attack"], []).append((row["cut"], row["tokens"]))
    against = titled_axes("rise of perplexity (0.05 is 5 %)", "tokens recovered")
    against["xaxis"]["type"] = "log"
    return [
        Chart(
            "Recovery against cost",
            "Each point is a setting: noise, codec or cut. Down and to the left is better, and rare.",
            _traces(cost, "markers"),
            against,
        ),
        Chart(
            "Recovery by cut, without noise",
            "Tokens read off the hidden states.",
            _traces(depth, "lines+markers"),
            titled_axes("cut", "tokens recovered"),
        ),
    ]


def _traces(points: Mapping[str, Sequence[tuple[float, float]]], mode: str) -> list[dict[str, Any]]:
    return [
        {
            "type": "scatter",
            "mode": mode,
            "name": name,
            "x": [x for x, _ in sorted(set(found))],
            "y": [y for _, y in sorted(set(found))],
        }
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
