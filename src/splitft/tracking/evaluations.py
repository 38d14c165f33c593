"""`eval.json` of a run folder: read, and shown as a table.

{"evaluations": [{"task": "e2e", "data": ..., "adapter": true, "rounds": 3, "metrics": {...}, ...}, ...]}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from splitft.errors import RunError
from splitft.tracking.table import Table

_METRICS = {
    "loss": ("loss", 3),
    "perplexity": ("perplexity", 2),
    "accuracy": ("token accuracy", 4),
    "bleu": ("BLEU", 2),
    "chrf": ("chrF", 2),
    "rouge_l": ("ROUGE-L", 4),
    "exact_match": ("exact match", 3),
    "answered": ("answered", 3),
}
"""The usual name of each metric, and the decimals it is shown with."""
METRICS = {key: name for key, (name, _) in _METRICS.items()}


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Read the entries of a run folder's `eval.json`; empty without one. Raises RunError if it is torn."""
    path = folder / "eval.json"
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["evaluations"]
        return [dict(entry) for entry in found if {"task", "data", "adapter", "metrics"} <= entry.keys()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is not what `splitft eval` writes; remove it and try again") from error


def evaluation_table(
    entries: Iterable[Mapping[str, Any]], rounds: int | None = None, short: bool = False
) -> Table:
    """Return one row for each entry.

    Args:
        entries: of `read_evaluations`
        rounds: rounds of the run today, to mark what was measured before the run continued
        short: show the name of a data file instead of its path
    """
    rows = []
    for entry in entries:
        metrics, done, source = entry["metrics"], entry.get("rounds"), entry["data"]
        counts = [
            f"{metrics[key]:,} {key.replace('_', ' ')}"
            for key in ("examples", "prompts", "references", "tokens", "left_out")
            if metrics.get(key)
        ]
        earlier = " (earlier)" if rounds is not None and done is not None and done < rounds else ""
        rows.append(
            (
                entry["task"],
                Path(source).name if short and Path(source).suffix else source,
                _model(entry),
                "–" if done is None else f"{done} round{'' if done == 1 else 's'}{earlier}",
                metrics_text(metrics),
                ", ".join(counts),
            )
        )
    return Table(("task", "text", "model", "after", "result", "of"), rows, "llllll")


def _model(entry: Mapping[str, Any]) -> str:
    if not entry["adapter"]:
        return "base alone"
    return "with adapter" if entry.get("client") is None else f"with the adapter of {entry['client']}"


def metric_text(key: str, value: float) -> str:
    """Return a metric with its usual decimals."""
    return f"{value:.{_METRICS[key][1]}f}"


def metrics_text(metrics: Mapping[str, float]) -> str:
    """Return all metrics in words: `BLEU 31.02, chrF 55.10, ROUGE-L 0.4812`."""
    return ", ".join(
        f"{name} {metric_text(key, metrics[key])}" for key, name in METRICS.items() if key in metrics
    )


def sample_lines(entries: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the first continuation of each task, with its prompt and reference."""
    for entry in entries:
        for sample in entry.get("samples", [])[:1]:
            yield ""
            for key in ("prompt", "reference", "written"):
                yield f"{key:<10}{' '.join(sample[key].split())}"
