"""Tables of a plan for the terminal: every client at a few cuts, and every controller's choice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

SHOWN = 8
"""Cuts shown of each client; `--json` has all."""


def price_tables(plan: dict[str, Any]) -> Iterator[tuple[str, Table]]:
    """For each client a heading and its seconds, MB and memory at up to SHOWN cuts."""
    for client in plan["clients"]:
        prices = list(client["prices"])
        step = max(1, -(-(len(prices) - 1) // (SHOWN - 1))) if len(prices) > 1 else 1
        shown = prices[::step] + ([prices[-1]] if (len(prices) - 1) % step else [])
        table = _table("", *(f"cut {price['cut']}" for price in shown))
        table.add_row("seconds a round", *(f"{price['seconds']:.3g}" for price in shown))
        table.add_row("MB up", *(f"{price['up_mb']:.1f}" for price in shown))
        table.add_row("MB down", *(f"{price['down_mb']:.1f}" for price in shown))
        table.add_row("GB of memory", *(f"{price['memory_gb']:.2f}" for price in shown))
        table.add_row("fits", *("yes" if price["fits"] else "no" for price in shown))
        yield f"{client['name']}: {client['device']}; {client['link']}", table


def choice_table(plan: dict[str, Any]) -> Table:
    """Each controller, its cuts and its round on the simulated clock."""
    table = _table("controller", "seconds a round", "cuts", "why")
    table.columns[2].justify = table.columns[3].justify = "left"
    for choice in plan["choices"]:
        seconds = choice["round_seconds"]
        cuts = " ".join(str(cut) for cut in choice["cuts"].values())
        table.add_row(
            choice["controller"], "–" if seconds is None else f"{seconds:.3g}", cuts or "–", choice["reason"]
        )
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table
