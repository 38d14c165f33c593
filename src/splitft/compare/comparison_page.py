"""A comparison of methods as tables and as a page.

    plain data of comparison.py --comparison_table, metric_table--> Table
                                --comparison_page--> one self-contained HTML page

Figures are means over the seeds, with the sample's standard deviation behind the loss.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from splitft.report.cost_charts import loss_with_bands
from splitft.report.page import render
from splitft.tracking.evaluations import METRICS, metric_text
from splitft.tracking.history import Point
from splitft.tracking.table import Table

HEADINGS = (
    "method", "loss", "perplexity", "s to\ntarget", "MB to\ntarget", "client\nGB", "client\ns", "server\ns",
    "the server\nreads",
)  # fmt: skip
NOTE = (
    "Loss and perplexity are of the held-out text after the last round, means over seeds; ± is the standard "
    "deviation. s and MB to target: simulated seconds, and traffic of training, until the first evaluation "
    "at or below the target. Client GB: predicted peak memory of the client that needs most. Client s and "
    "server s: seconds of computing a round on the simulated clock, of the client that computes most and of "
    "the server."
)


def comparison_table(data: Mapping[str, Any]) -> Table:
    """Return one row for each method, in the order in which they were asked for."""
    rows = []
    for one in data["methods"]:
        short = "" if one["reached"] == len(one["seeds"]) else f" ({one['reached']} of {len(one['seeds'])})"
        rows.append(
            (
                one["method"],
                _spread(one["loss"]),
                _mean(one["perplexity"], "{:.4g}"),
                _mean(one["simulated_s_to_target"], "{:,.1f}") + short,
                _mean(one["mb_to_target"], "{:,.1f}") + short,
                _mean(one["client_memory_gb"], "{:.2f}"),
                _mean(one["client_s_a_round"], "{:.2f}"),
                _mean(one["server_s_a_round"], "{:.2f}"),
                one["server_reads"],
            )
        )
    return Table(HEADINGS, rows, "lrrrrrrrl", gap=1, wrap=(len(HEADINGS) - 1,))


def metric_table(data: Mapping[str, Any]) -> Table | None:
    """Return the task metrics of the methods' models, one row each; None where none was measured."""
    keys = [key for key in METRICS if any(key in one["metrics"] for one in data["methods"])]
    rows = [
        (one["method"], *(_metric(key, one["metrics"].get(key, [])) for key in keys))
        for one in data["methods"]
    ]
    return Table(("method", *(METRICS[key] for key in keys)), rows) if keys else None


def target_sentence(data: Mapping[str, Any]) -> str:
    """Describe the target in one sentence."""
    return f"Target: held-out loss {data['target']:.4f}, {data['target_is']}."


def comparison_page(data: Mapping[str, Any], config: str) -> str:
    """Return the page; `config` is the text of the configuration."""
    histories: dict[str, list[list[Point]]] = {}
    for run in data["runs"]:
        histories.setdefault(run["method"], []).append([Point(**point) for point in run["course"]])
    runs = [
        (run["method"], str(run["seed"]), f"{run['course'][-1]['loss']:.4f}", run["folder"])
        for run in data["runs"]
    ]
    return render(
        "compare/comparison.html.j2",
        title="Methods side by side",
        seeds=", ".join(map(str, data["seeds"])),
        methods=data["methods"],
        table=comparison_table(data),
        note=f"{target_sentence(data)} {NOTE}",
        metrics=metric_table(data),
        charts=[chart for chart in loss_with_bands(histories, data["target"]) if chart.data],
        runs=Table(("method", "seed", "loss after", "folder"), runs, "lrrl", wrap=(3,)),
        config=config,
    )


def _metric(key: str, values: Sequence[float]) -> str:
    if not values:
        return "–"
    deviation = f"±{metric_text(key, statistics.stdev(values))}" if len(values) > 1 else ""
    return f"{metric_text(key, statistics.fmean(values))}{deviation}"


def _mean(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(sum(known) / len(known)) if known else "–"


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean}±{statistics.stdev(values):.3f}" if len(values) > 1 else mean
