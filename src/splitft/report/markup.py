"""The parts of a page: tables, charts and text, with everything that comes from a run escaped.

    strings, Charts --table, charts, text--> HTML

The charts' data are JSON that cannot end its own script element.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence

from splitft.report.charts import Chart


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Rows of text under their headings; `kind` is a class of page.css."""
    head = "".join(f"<th scope=col>{text(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    whole = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
    return f"<div class='scroll {kind}'>{whole}</div>\n"


def charts(drawn: Iterable[Chart]) -> str:
    """Each chart's words and, for page.js to draw, its figure as JSON."""
    parts = []
    for chart in drawn:
        figure = json.dumps({"data": chart.data, "layout": chart.layout}, allow_nan=False)
        safe = figure.replace("<", "\\u003c")  # so that no name can end the script element
        notes = "".join(f"<li>{text(note)}</li>\n" for note in chart.notes)
        notes = f"<ul class=notes>\n{notes}</ul>\n" if notes else ""
        parts.append(
            f"<figure{' class=wide' if chart.wide else ''}>\n"
            f"<figcaption><b>{text(chart.title)}</b> {text(chart.caption)}</figcaption>\n"
            f'<div class=chart style="height: {chart.height}px"></div>\n'
            f'<script type="application/json">{safe}</script>\n{notes}</figure>\n'
        )
    return f"<div class=charts>\n{''.join(parts)}</div>\n"


def count(number: int, noun: str) -> str:
    """A number of things in words: 1 round, 2 rounds."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def text(plain: str) -> str:
    """Text as it is, whatever is in it."""
    return html.escape(plain)
