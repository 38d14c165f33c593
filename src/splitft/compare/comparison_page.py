"""A comparison of methods as tables and as a page.

    plain data of comparison.py --comparison_table, metric_table--> Table
                                --comparison_page--> one self-contained HTML page

Figures are means over the seeds, with the sample's standard deviation behind the loss.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from splitft.report.cost_charts import accuracy_by_round, loss_with_bands
from splitft.report.page import render
from splitft.tracking.evaluations import METRICS, metric_text
from splitft.tracking.history import Point
from splitft.tracking.table import Table

HEADINGS = (
    "method", "loss", "perplexity", "right\n%", "s to\ntarget", "MB to\ntarget", "client\nGB", "client\ns",
    "server\ns", "the server\nreads",
)  # fmt: skip
NOTE = (
    "Loss and perplexity are of the held-out text after the last round, means over seeds; ± is the "
    "standard deviation. Right: share of its tokens that are the most probable ones. s and MB to target: "
    "simulated seconds, and traffic of training, until the first evaluation at or below the target. "
    "Client GB: predicted peak memory of the client that needs most. Client s and server s: seconds of "
    "computing a round on the simulated clock, of the client that computes most and of the server."
)

TARGETS_NOTE = (
    "s and MB to each of several losses, none of which any run has after its first round, unless the target "
    "is so high; behind them, if not all, the number of seeds that reach it. Mean loss by s and by MB: the "
    "area under the loss, divided by its width, up to the least that any run spent in all."
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
                _mean([share and 100 * share for share in one["accuracy"]], "{:.1f}"),
                _mean(one["simulated_s_to_target"], "{:,.1f}") + short,
                _mean(one["mb_to_target"], "{:,.1f}") + short,
                _mean(one["client_memory_gb"], "{:.2f}"),
                _mean(one["client_s_a_round"], "{:.2f}"),
                _mean(one["server_s_a_round"], "{:.2f}"),
                one["server_reads"],
            )
        )
    return Table(HEADINGS, rows, "lrrrrrrrrl", gap=1, wrap=(len(HEADINGS) - 1,))


def target_table(data: Mapping[str, Any]) -> Table:
    """Return what each method spends to come down to each of several losses, and its mean loss on the way."""
    goals = [f"{goal:.3f}" for goal in data["targets"]]
    headings = ("method", *(f"s to\n{goal}" for goal in goals), *(f"MB to\n{goal}" for goal in goals),
                "mean loss\nby s", "mean loss\nby MB")  # fmt: skip
    rows = []
    for one in data["methods"]:
        costs = [
            _mean(goal[key], "{:,.1f}")
            + ("" if goal["reached"] == len(one["seeds"]) else f" ({goal['reached']})")
            for key in ("simulated_s", "mb")
            for goal in one["to_targets"]
        ]
        means = [_mean(one["mean_loss"][key], "{:.3f}") for key in ("simulated_s", "mb")]
        rows.append((one["method"], *costs, *means))
    return Table(headings, rows, gap=1)


def tuning_table(data: Mapping[str, Any]) -> Table | None:
    """Return what was tried and chosen for each method; None without tuning."""
    rows = []
    for choice in data.get("tuning", ()):
        tried = [
            f"{_values(one['values'])}: " + (one["failed"] or f"{one['loss']:.4f} after {one['rounds']}")
            for one in choice["tried"]
        ]
        rows.append((choice["method"], _values(choice["chosen"]) or "nothing to choose", "; ".join(tried)))
    return Table(("method", "chosen", "loss of each after rounds"), rows, "lll") if rows else None


def paired_sentence(data: Mapping[str, Any]) -> str:
    """Return the differences of the methods from the first one, in a sentence; empty if there is one."""
    parts = []
    for one in data["paired"]:
        p = "" if one["p"] is None else f" (p {one['p']:.2g})"
        parts.append(f"{one['method']} {one['difference']:+.4f}{p}")
    if not parts:
        return ""
    tested = " by a paired t-test over seeds" if any(one["p"] is not None for one in data["paired"]) else ""
    return f"Loss against {data['paired'][0]['against']}{tested}: {', '.join(parts)}."


def _values(values: Mapping[str, str]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in values.items())


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


def comparison_tables(data: Mapping[str, Any]) -> list[Table]:
    """Return all tables, as a terminal shows them."""
    tables = (tuning_table(data), comparison_table(data), target_table(data), metric_table(data))
    return [table for table in tables if table is not None]


def comparison_lines(data: Mapping[str, Any]) -> list[str]:
    """Return what is said below the tables."""
    return [line for line in (f"{target_sentence(data)} {NOTE}", TARGETS_NOTE, paired_sentence(data),
                              *edge_sentences(data)) if line]  # fmt: skip


def edge_sentences(data: Mapping[str, Any]) -> list[str]:
    """Return a warning for each method whose best value is the least or greatest of those that were tried."""
    return [
        f"{one['method']}: the best {key} is at the edge of what was tried; give values beyond it"
        for one in data.get("tuning", ())
        for key in one["at_edge"]
    ]


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
        targets=target_table(data),
        targets_note=f"{TARGETS_NOTE} {paired_sentence(data)}".strip(),
        edges=" ".join(f"{line}." for line in edge_sentences(data)),
        tuning=tuning_table(data),
        metrics=metric_table(data),
        charts=[
            *(chart for chart in loss_with_bands(histories, data["target"]) if chart.data),
            *accuracy_by_round(histories),
        ],
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
