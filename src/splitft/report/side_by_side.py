"""The page about several runs side by side.

    [Told, Told, ...] --several_runs--> HTML

One row a run, the configuration keys on which they differ, charts that share their axes (the simulated clock
among them), then each in short. Runs on different text or models are shown all the same, with a warning.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from splitft.report.charts import of_several_runs
from splitft.report.cost_charts import against_costs, simulated_by_round
from splitft.report.markup import charts, table, text
from splitft.report.sections import RunRecord, clients, config, privacy, state, tasks, warnings
from splitft.tracking import comparability as same_data
from splitft.tracking.history import loss_history
from splitft.tracking.summary import change_text, clock, headline, loss_text


def several_runs(told: Sequence[RunRecord]) -> str:
    """The page about several runs."""
    summaries = {one.name: one.summary for one in told}
    drawn = [
        *of_several_runs(summaries, {one.name: one.events for one in told}),
        *against_costs({one.name: loss_history(one.events) for one in told}),
        *simulated_by_round(summaries),
    ]
    warned = "".join(
        f"<p class='note warn'><b>These runs do not compare.</b> {text(said)}.</p>\n"
        for said in same_data.differences(list(summaries.items()))
    )
    differing = _differences(told)
    differences = table(("key", *(one.name for one in told)), differing)
    differences = f"<h2>What differs</h2>\n{differences}" if differing else ""
    runs = "".join(
        f"<h2>{text(one.name)}{state(one)}</h2>\n<p class=facts>{text(headline(one.summary))}</p>\n"
        f"{privacy(one.summary)}{warnings(one.summary)}{clients(one.summary)}{tasks(one)}{config(one)}"
        for one in told
    )
    return (
        f"<header>\n<p class=eyebrow>splitft</p>\n<h1>{len(told)} runs side by side</h1>\n</header>\n"
        f"{warned}{_runs(told)}{differences}"
        f"<h2>How they went</h2>\n{charts(drawn)}{runs}"
    )


def _runs(told: Sequence[RunRecord]) -> str:
    """One row a run."""
    headings = (
        "run", "method", "model", "seed", "rounds", "loss before", "loss after", "change",
        "tokens", "MB", "time", "simulated",
    )  # fmt: skip
    rows = []
    for one in told:
        summary, losses = one.summary, one.summary["eval_loss"]
        simulated = summary["simulated_seconds"]
        sent = sum(sum(counts.values()) for counts in summary["bytes"].values()) / 1e6
        of = "" if summary["finished"] else f" of {one.started.rounds}"
        rows.append(
            (
                one.name,
                summary["method"],
                summary["model"],
                str(summary["seed"]),
                f"{summary['rounds']}{of}",
                loss_text(losses, 0),
                loss_text(losses, -1),
                change_text(losses),
                f"{summary['tokens']:,}",
                f"{sent:,.1f}",
                clock(summary["wall_seconds"]),
                "–" if simulated is None else clock(simulated),
            )
        )
    return table(headings, rows)


def _differences(told: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """The configuration keys on which the runs differ, with each run's value."""
    flat = [dict(_leaves(_mapping(one.config))) for one in told]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [(key, *(one.get(key, "–") for one in flat)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _mapping(written: str) -> Mapping[str, Any]:
    try:
        data = yaml.safe_load(written)
    except yaml.YAMLError:
        return {}  # the page shows its text all the same
    return data if isinstance(data, dict) else {}


def _leaves(data: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    """Every value with its dotted path."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{before}{key}.")
        else:
            plain = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            yield f"{before}{key}", plain
