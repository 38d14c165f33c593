"""The comparison of methods as plain data: what each reached, at what cost, and what its server could read.

    [Trained(method, seed, summary, history), ...] --compare_runs--> plain data --comparison_table--> terminal
                                                                               --comparison_page--> HTML

Seconds are those of the simulated clock and memory is predicted; both follow from the devices and links of
the configuration. A target is reached at the first evaluation with that loss or less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from splitft.errors import RunError
from splitft.tracking.comparability import differences
from splitft.tracking.evaluations import METRICS
from splitft.tracking.history import Point, first_below, mean_loss_on_the_way

CLIENT_LEGS = ("client_forward", "head", "client_backward")
"""Legs in which a client computes."""
SERVER = "server"
LEAST_SEEDS = 3
"""Fewest seeds for a paired test."""
COSTS: Mapping[str, Callable[[Point], float | None]] = {
    "simulated_s": lambda point: point.simulated_s,
    "mb": lambda point: point.mb,
}
"""Costs over which the mean loss on the way is taken, up to the least that any run spent in all."""
READS = {"text": "all the text", "nothing": "nothing", "adapters": "adapters"}
"""What a server reads that gets no hidden states, by `RunStarted.received`."""


@dataclass(frozen=True)
class Trained:
    """One finished run of a comparison."""

    method: str
    seed: int
    folder: str
    summary: Mapping[str, Any]
    """Its `summary.json`."""
    history: Sequence[Point]
    """Its held-out losses and their costs."""
    server_reads: str
    """What its server can read, in a few words."""
    about: str = ""
    """What makes the method different, in a line."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Results of `splitft eval` on its model: BLEU and others by key."""


def server_reads(summary: Mapping[str, Any], received: str | None = None) -> str:
    """Return what the server can read, by what the run says it received, or else by the counted bytes."""
    if received in READS:
        return READS[received]
    sent = {role for role, counts in summary["bytes"].items() if counts["up"]}
    if "label" in sent:
        return "the text"
    if "hidden" in sent:
        return "hidden states"
    return "adapters" if sent else "nothing"


def compare_runs(runs: Sequence[Trained], target: float | None = None) -> dict[str, Any]:
    """Return the comparison as plain data; raise RunError if the runs had different text or models."""
    if not runs:
        raise RunError("a comparison needs at least one run")
    refuse_different_data(runs)
    for run in runs:
        if len(run.history) < 2:
            raise RunError(
                f"{run.folder}: no finite held-out loss after training, so there is nothing to compare; "
                f"lower training.lr, or leave {run.method} out"
            )
    reached, why = (target, "as given") if target is not None else common_target(runs)
    goals = targets(runs, reached)
    methods = dict.fromkeys(run.method for run in runs)
    ends = {key: min(cost(run.history[-1]) or 0.0 for run in runs) for key, cost in COSTS.items()}
    return {
        "target": reached,
        "target_is": why,
        "seeds": sorted({run.seed for run in runs}),
        "targets": goals,
        "methods": [_method([run for run in runs if run.method == name], goals, ends) for name in methods],
        "paired": _paired(runs, list(methods)),
        "runs": [
            {
                "method": run.method,
                "seed": run.seed,
                "folder": run.folder,
                "course": [asdict(point) for point in run.history],
            }
            for run in runs
        ],
    }


def refuse_different_data(runs: Sequence[Trained]) -> None:
    """Raise RunError, with the difference, if the runs do not compare."""
    found = differences([(run.folder, run.summary) for run in runs])
    if found:
        raise RunError(
            f"{found[0]}. Losses on different text do not compare: remove the older folder, or give "
            f"another --out"
        )


def common_target(runs: Sequence[Trained]) -> tuple[float, str]:
    """Return the lowest loss that every run reaches, and a description of it."""
    best = {(run.method, run.seed): min(point.loss for point in run.history[1:]) for run in runs}
    (method, seed), loss = max(best.items(), key=lambda item: item[1])
    start = next(run.history[0].loss for run in runs if (run.method, run.seed) == (method, seed))
    weak = "; it did not improve on its start" if loss >= start else ""
    return loss, f"the lowest that every run reaches: the best of {method}, seed {seed}{weak}"


def targets(runs: Sequence[Trained], lowest: float) -> list[float]:
    """Return losses to reach, from the highest: `lowest`, and two between it and what any run has at first.

    No run reaches one of them with its first evaluation after training began, unless `lowest` is so high.
    """
    first = min(run.history[1].loss for run in runs)
    return [lowest + (first - lowest) * part for part in (2 / 3, 1 / 3, 0.0)] if lowest < first else [lowest]


def _paired(runs: Sequence[Trained], methods: Sequence[str]) -> list[dict[str, Any]]:
    """Return the difference of each method's final loss from the first method's, seed by seed.

    p is that of the paired t-test, two-sided; None with fewer than three seeds, or without any spread.
    """
    from scipy.stats import ttest_rel  # here, because it takes a while to import

    last = {(run.method, run.seed): run.history[-1].loss for run in runs}
    seeds = sorted({run.seed for run in runs})
    found = []
    for method in methods[1:]:
        both = [seed for seed in seeds if (method, seed) in last and (methods[0], seed) in last]
        if not both:
            continue
        pairs = [(last[method, seed], last[methods[0], seed]) for seed in both]
        differences = [one - other for one, other in pairs]
        p = None
        if len(pairs) >= LEAST_SEEDS and len(set(differences)) > 1:
            p = float(ttest_rel(*zip(*pairs, strict=True)).pvalue)
        mean = sum(differences) / len(differences)
        found.append({"method": method, "against": methods[0], "difference": mean, "p": p})
    return found


def _method(runs: Sequence[Trained], goals: Sequence[float], ends: Mapping[str, float]) -> dict[str, Any]:
    """Return the figures of one method, one number for each seed; the last of the goals is the target."""
    target = goals[-1]
    last = [run.history[-1].loss for run in runs]
    reached = [point for run in runs if (point := first_below(run.history, target)) is not None]
    return {
        "method": runs[0].method,
        "about": runs[0].about,
        "seeds": [run.seed for run in runs],
        "loss": last,
        "loss_before": [run.history[0].loss for run in runs],
        "perplexity": [math.exp(min(loss, 700.0)) for loss in last],
        "accuracy": [run.history[-1].accuracy for run in runs],
        "reached": len(reached),
        "simulated_s_to_target": [point.simulated_s for point in reached if point.simulated_s is not None],
        "mb_to_target": [point.mb for point in reached],
        "to_targets": [_reached(runs, goal) for goal in goals],
        "mean_loss": {
            key: [_finite(mean_loss_on_the_way(run.history, cost, ends[key])) for run in runs]
            for key, cost in COSTS.items()
        },
        "examples": [run.history[-1].examples for run in runs],
        "simulated_s": [run.history[-1].simulated_s for run in runs],
        "mb": [run.history[-1].mb for run in runs],
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


def _reached(runs: Sequence[Trained], target: float) -> dict[str, Any]:
    """Return the costs of the runs that reach a loss, when they first do."""
    points = [point for run in runs if (point := first_below(run.history, target)) is not None]
    return {
        "loss": target,
        "reached": len(points),
        "simulated_s": [point.simulated_s for point in points if point.simulated_s is not None],
        "mb": [point.mb for point in points],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _most_memory(summary: Mapping[str, Any]) -> float | None:
    """Return the predicted memory, in GB, of the client that needs most."""
    memory = (summary["simulated"] or {}).get("memory_bytes", {})
    return max((needed / 1e9 for who, needed in memory.items() if who != SERVER), default=None)


def _client_seconds(summary: Mapping[str, Any]) -> float | None:
    """Return the seconds a round in which the busiest client computes."""
    simulated = summary["simulated"]
    if not simulated or not summary["rounds"]:
        return None
    busy: list[float] = [
        sum(legs.get(leg, 0.0) for leg in CLIENT_LEGS) for legs in simulated["legs"].values()
    ]
    return max(busy, default=0.0) / float(summary["rounds"])


def _server_seconds(summary: Mapping[str, Any]) -> float | None:
    """Return the seconds a round in which the server computes."""
    simulated = summary["simulated"]
    if not simulated or not summary["rounds"]:
        return None
    whole: float = sum(simulated["seconds"]) - sum(simulated["move_seconds"])
    idle: float = simulated["idle"].get(SERVER, whole)
    return max(0.0, whole - idle) / float(summary["rounds"])
