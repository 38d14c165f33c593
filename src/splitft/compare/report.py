"""Methods side by side: what each reached, at what cost, and what its server could read.

    [Trained(method, seed, summary, course), ...] --compared--> plain data --comparison_table--> terminal
                                                                           --comparison_body--> HTML

Figures are means over the seeds, with the sample's standard deviation behind the loss. Seconds are those of
the simulated clock, memory is foretold; both follow from the devices and links of the configuration. A target
is reached at the first evaluation with that loss or less.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.markup import escape
from rich.table import Table

from splitft.errors import RunError
from splitft.report.cost_charts import with_bands
from splitft.report.markup import charts, count, table, text
from splitft.tracking import comparability as same_data
from splitft.tracking.evaluations import EVALUATION_NOTE, METRICS, shown
from splitft.tracking.history import Point, first_below

HEADINGS = (
    "method", "loss", "perplexity", "s to target", "MB to target", "client GB", "client s", "server s",
    "the server reads",
)  # fmt: skip
"""Columns of `comparison_rows`."""
NARROW = (
    "method", "loss", "perplexity", "s to\ntarget", "MB to\ntarget", "client\nGB", "client\ns", "server\ns",
    "server\nreads",
)  # fmt: skip
"""The same for a terminal."""
CLIENT_LEGS = ("client_forward", "head", "client_backward")
"""Legs in which a client computes."""
SERVER = "server"
NOTE = (
    "Loss and perplexity are of the held-out text after the last round, means over seeds; ± is the standard "
    "deviation. s and MB to target: simulated seconds, and traffic of training, until the first evaluation "
    "at or below the target. Client GB: foretold peak memory of the client that needs most. Client s and "
    "server s: seconds of computing a round on the simulated clock, of the client that computes most and of "
    "the server."
)


@dataclass(frozen=True)
class Trained:
    """One finished run of a comparison."""

    method: str
    seed: int
    folder: str
    summary: Mapping[str, Any]
    """Its `summary.json`."""
    course: Sequence[Point]
    """Its held-out losses and their costs."""
    server_reads: str
    """What its server can read, in a few words."""
    about: str = ""
    """What makes the method different, in a line."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What its model can do, of `splitft eval`: BLEU and others by key."""


READS = {"text": "all the text", "nothing": "nothing", "adapters": "adapters"}
"""What a server without hidden states reads, by what a run says that it received."""


def server_reads(summary: Mapping[str, Any], received: str | None = None) -> str:
    """What reached the server in this run: as the run says, or else by the bytes that were counted."""
    if received in READS:
        return READS[received]
    sent = {role for role, counts in summary["bytes"].items() if counts["up"]}
    if "label" in sent:
        return "the text"
    if "hidden" in sent:
        return "hidden states"
    return "adapters" if sent else "nothing"


def compared(runs: Sequence[Trained], target: float | None = None) -> dict[str, Any]:
    """The comparison as plain data. Raises RunError if the runs had different text or models."""
    if not runs:
        raise RunError("a comparison needs at least one run")
    refuse_different_data(runs)
    for run in runs:
        if len(run.course) < 2:
            raise RunError(
                f"{run.folder}: no finite held-out loss after training, so there is nothing to compare; "
                f"lower training.lr, or leave {run.method} out"
            )
    reached, why = (target, "as given") if target is not None else common_target(runs)
    methods = dict.fromkeys(run.method for run in runs)
    return {
        "target": reached,
        "target_is": why,
        "seeds": sorted({run.seed for run in runs}),
        "methods": [_method([run for run in runs if run.method == name], reached) for name in methods],
        "runs": [
            {
                "method": run.method,
                "seed": run.seed,
                "folder": run.folder,
                "course": [asdict(point) for point in run.course],
            }
            for run in runs
        ],
    }


def refuse_different_data(runs: Sequence[Trained]) -> None:
    """Raise RunError, with what differs, if the runs do not compare."""
    found = same_data.differences([(run.folder, run.summary) for run in runs])
    if found:
        raise RunError(
            f"{found[0]}. Losses on different text do not compare: remove the older folder, or give "
            f"another --out"
        )


def common_target(runs: Sequence[Trained]) -> tuple[float, str]:
    """The lowest loss that every run reaches, and in words whose it is."""
    best = {(run.method, run.seed): min(point.loss for point in run.course[1:]) for run in runs}
    (method, seed), loss = max(best.items(), key=lambda item: item[1])
    start = next(run.course[0].loss for run in runs if (run.method, run.seed) == (method, seed))
    weak = "; it did not improve on its start" if loss >= start else ""
    return loss, f"the lowest that every run reaches: the best of {method}, seed {seed}{weak}"


def _method(runs: Sequence[Trained], target: float) -> dict[str, Any]:
    """One method over its seeds."""
    last = [run.course[-1].loss for run in runs]
    hits = [first_below(run.course, target) for run in runs]
    reached = [point for point in hits if point is not None]
    seconds = [point.simulated_s for point in reached if point.simulated_s is not None]
    return {
        "method": runs[0].method,
        "about": runs[0].about,
        "seeds": [run.seed for run in runs],
        "loss": last,
        "loss_before": [run.course[0].loss for run in runs],
        "perplexity": [math.exp(min(loss, 700.0)) for loss in last],
        "reached": len(reached),
        "simulated_s_to_target": seconds,
        "mb_to_target": [point.mb for point in reached],
        "simulated_s": [run.course[-1].simulated_s for run in runs],
        "mb": [run.course[-1].mb for run in runs],
        "client_memory_gb": [_most_memory(run.summary) for run in runs],
        "client_s_a_round": [_client_seconds(run.summary) for run in runs],
        "server_s_a_round": [_server_seconds(run.summary) for run in runs],
        "server_reads": runs[0].server_reads,
        "metrics": {
            key: [run.metrics[key] for run in runs if key in run.metrics]
            for key in METRICS
            if any(key in run.metrics for run in runs)
        },
    }


def _most_memory(summary: Mapping[str, Any]) -> float | None:
    """GB of the client that needs most."""
    memory = (summary["simulated"] or {}).get("memory_bytes", {})
    return max((needed / 1e9 for who, needed in memory.items() if who != SERVER), default=None)


def _client_seconds(summary: Mapping[str, Any]) -> float | None:
    """Seconds a round in which the busiest client computes."""
    simulated = summary["simulated"]
    if not simulated or not summary["rounds"]:
        return None
    busy: list[float] = [
        sum(legs.get(leg, 0.0) for leg in CLIENT_LEGS) for legs in simulated["legs"].values()
    ]
    return max(busy, default=0.0) / float(summary["rounds"])


def _server_seconds(summary: Mapping[str, Any]) -> float | None:
    """Seconds a round in which the server computes."""
    simulated = summary["simulated"]
    if not simulated or not summary["rounds"]:
        return None
    whole: float = sum(simulated["seconds"]) - sum(simulated["move_seconds"])
    idle: float = simulated["idle"].get(SERVER, whole)
    return max(0.0, whole - idle) / float(summary["rounds"])


def comparison_rows(told: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row of text a method, in the order in which they were asked for."""
    rows: list[tuple[str, ...]] = []
    for one in told["methods"]:
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
    return rows


def metric_columns(told: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows of what the methods' models can do; no rows where it was not measured."""
    keys = [key for key in METRICS if any(key in one["metrics"] for one in told["methods"])]
    rows: list[tuple[str, ...]] = [
        (one["method"], *(_metric(key, one["metrics"].get(key, [])) for key in keys))
        for one in told["methods"]
    ]
    return ("method", *(METRICS[key] for key in keys)), rows if keys else []


def metric_table(told: Mapping[str, Any]) -> Table | None:
    """The same for the terminal; None where it was not measured."""
    headings, rows = metric_columns(told)
    if not rows:
        return None
    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for place, heading in enumerate(headings):
        made.add_column(heading, justify="right" if place else "left")
    for row in rows:
        made.add_row(*map(escape, row))
    return made


def comparison_table(told: Mapping[str, Any]) -> Table:
    """The rows for the terminal."""
    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for place, heading in enumerate(NARROW):
        last = place == len(NARROW) - 1
        made.add_column(heading, justify="left" if last or not place else "right", no_wrap=not last)
    for row in comparison_rows(told):
        made.add_row(*map(escape, row))
    return made


def target_sentence(told: Mapping[str, Any]) -> str:
    """The target in words."""
    return f"Target: held-out loss {told['target']:.4f}, {told['target_is']}."


def comparison_body(told: Mapping[str, Any], config: str) -> str:
    """The page's body."""
    seeds = ", ".join(map(str, told["seeds"]))
    courses: dict[str, list[list[Point]]] = {}
    for run in told["runs"]:
        courses.setdefault(run["method"], []).append([Point(**point) for point in run["course"]])
    about = "".join(
        f"<p class=facts><b>{text(one['method'])}</b> {text(one['about'])}</p>\n"
        for one in told["methods"]
        if one["about"]
    )
    runs = [
        (run["method"], str(run["seed"]), f"{run['course'][-1]['loss']:.4f}", run["folder"])
        for run in told["runs"]
    ]
    drawn = [chart for chart in with_bands(courses, told["target"]) if chart.data]
    return (
        "<header>\n<p class=eyebrow>splitft compare</p>\n"
        f"<h1>{count(len(told['methods']), 'method')} side by side</h1>\n"
        f"<p class=facts>The same text for all; seeds {text(seeds)}.</p>\n</header>\n"
        f"{table(HEADINGS, comparison_rows(told), 'machines')}"
        f"<p class=caption>{text(target_sentence(told))} {text(NOTE)}</p>\n{about}"
        f"{_tasks(told)}<h2>How they went</h2>\n{charts(drawn)}"
        f"<h2>Runs</h2>\n{table(('method', 'seed', 'loss after', 'folder'), runs, 'machines')}"
        f"<details>\n<summary>Configuration</summary>\n<pre>{text(config)}</pre>\n</details>\n"
    )


def _tasks(told: Mapping[str, Any]) -> str:
    """What the models can do; nothing where it was not measured."""
    headings, rows = metric_columns(told)
    note = f"<p class=caption>{EVALUATION_NOTE} Means over seeds on the text that the runs held out.</p>\n"
    return f"<h2>Tasks</h2>\n{table(headings, rows)}{note}" if rows else ""


def _metric(key: str, values: Sequence[float]) -> str:
    if not values:
        return "–"
    deviation = f"±{shown(key, statistics.stdev(values))}" if len(values) > 1 else ""
    return f"{shown(key, statistics.fmean(values))}{deviation}"


def _mean(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(sum(known) / len(known)) if known else "–"


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean}±{statistics.stdev(values):.3f}" if len(values) > 1 else mean
