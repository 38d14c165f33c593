"""The page about several runs side by side.

    [RunRecord, RunRecord, ...] --several_runs--> HTML

One row a run, the configuration keys on which they differ, charts that share their axes, then each run in
short. Runs on different text or models are shown too, with a warning.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from splitft.report.charts import several_runs_charts
from splitft.report.cost_charts import loss_against_costs, simulated_by_round
from splitft.report.page import render
from splitft.report.run_record import RunRecord
from splitft.report.sections import run_values
from splitft.tracking.comparability import differences
from splitft.tracking.history import loss_history
from splitft.tracking.summary import change_text, clock, loss_text, share_text
from splitft.tracking.table import Table


def several_runs(runs: Sequence[RunRecord]) -> str:
    """Return the page about several runs."""
    summaries = {run.name: run.summary for run in runs}
    return render(
        "report/templates/several_runs.html.j2",
        title=f"{len(runs)} runs side by side",
        warnings=differences(list(summaries.items())),
        table=_run_table(runs),
        differences=_differing_keys(runs),
        charts=[
            *several_runs_charts(summaries, {run.name: run.events for run in runs}),
            *loss_against_costs({run.name: loss_history(run.events) for run in runs}),
            *simulated_by_round(summaries),
        ],
        runs=[run_values(run) for run in runs],
    )


def _run_table(runs: Sequence[RunRecord]) -> Table:
    """Return one row for each run."""
    headings = (
        "run", "method", "model", "seed", "rounds", "loss before", "loss after", "change", "accuracy after",
        "tokens", "MB", "time", "simulated",
    )  # fmt: skip
    rows = []
    for run in runs:
        summary, losses = run.summary, run.summary["eval_loss"]
        simulated = summary["simulated_seconds"]
        sent = sum(sum(counts.values()) for counts in summary["bytes"].values()) / 1e6
        of = "" if summary["finished"] else f" of {run.started.rounds}"
        rows.append(
            (
                run.name,
                summary["method"],
                summary["model"],
                str(summary["seed"]),
                f"{summary['rounds']}{of}",
                loss_text(losses, 0),
                loss_text(losses, -1),
                change_text(losses),
                share_text(summary["eval_accuracy"]),
                f"{summary['tokens']:,}",
                f"{sent:,.1f}",
                clock(summary["wall_seconds"]),
                "–" if simulated is None else clock(simulated),
            )
        )
    return Table(headings, rows)


def _differing_keys(runs: Sequence[RunRecord]) -> Table | None:
    """Return the configuration keys on which the runs differ, with each run's value; None if they agree."""
    flat = [dict(_leaves(_mapping(run.config))) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [(key, *(one.get(key, "–") for one in flat)) for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return Table(("key", *(run.name for run in runs)), rows) if rows else None


def _mapping(written: str) -> Mapping[str, Any]:
    """Return a configuration as plain data; empty if it is not valid YAML."""
    try:
        data = yaml.safe_load(written)
    except yaml.YAMLError:
        return {}  # the page shows the text
    return data if isinstance(data, dict) else {}


def _leaves(data: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield the dotted path and the value of every leaf."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            yield f"{prefix}{key}", text
