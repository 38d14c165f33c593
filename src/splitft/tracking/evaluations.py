"""`eval.json` of a run folder: read, and shown as rows.

{"evaluations": [{"task": "e2e", "data": ..., "adapter": true, "rounds": 3, "metrics": {...}, ...}, ...]}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from splitft.errors import RunError

EVALUATION_HEADINGS = ("task", "text", "model", "after", "result", "of")
"""Columns of `evaluation_rows`."""
EVALUATION_NOTE = (
    "Measured by <code>splitft eval</code> on the base model with the exported adapter (or without it). "
    "BLEU and chrF are of 0 to 100; ROUGE-L, exact match and answered of 0 to 1."
)
_NAMES = {
    "loss": ("loss", 3),
    "perplexity": ("perplexity", 2),
    "bleu": ("BLEU", 2),
    "chrf": ("chrF", 2),
    "rouge_l": ("ROUGE-L", 4),
    "exact_match": ("exact match", 3),
    "answered": ("answered", 3),
}
"""Metrics in words, with the decimals they are shown with."""


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """What `eval.json` of a run folder holds; nothing where there is none. Raises RunError if it is torn."""
    path = folder / "eval.json"
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["evaluations"]
        known = [dict(entry) for entry in found if {"task", "data", "adapter", "metrics"} <= entry.keys()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is not what `splitft eval` writes; remove it and try again") from error
    return known


def evaluation_rows(
    entries: Iterable[Mapping[str, Any]], rounds: int | None = None
) -> Iterator[tuple[str, ...]]:
    """One row an entry; what was measured before the run went on is marked."""
    for entry in entries:
        metrics = entry["metrics"]
        counts = [
            f"{metrics[key]:,} {key.replace('_', ' ')}"
            for key in ("examples", "prompts", "references", "tokens", "left_out")
            if metrics.get(key)
        ]
        done = entry.get("rounds")
        earlier = " (earlier)" if rounds is not None and done is not None and done < rounds else ""
        yield (
            entry["task"],
            entry["data"],
            _model(entry),
            "–" if done is None else f"{done} round{'' if done == 1 else 's'}{earlier}",
            in_words(metrics),
            ", ".join(counts),
        )


def _model(entry: Mapping[str, Any]) -> str:
    if not entry["adapter"]:
        return "base alone"
    return "with adapter" if entry.get("client") is None else f"with the adapter of {entry['client']}"


METRICS = {key: name for key, (name, _) in _NAMES.items()}
"""How each metric is called."""


def shown(key: str, value: float) -> str:
    """A metric with its usual decimals."""
    return f"{value:.{_NAMES[key][1]}f}"


def in_words(metrics: Mapping[str, float]) -> str:
    """The figures of an outcome: `BLEU 31.02, chrF 55.10, ROUGE-L 0.4812`."""
    return ", ".join(f"{name} {shown(key, metrics[key])}" for key, name in METRICS.items() if key in metrics)


def evaluation_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """The rows for the terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in EVALUATION_HEADINGS:
        table.add_column(heading)
    for task, source, *others in evaluation_rows(entries):
        short = Path(source).name if Path(source).suffix else source
        table.add_row(*map(escape, (task, short, *others)))
    return table


def sample_lines(entries: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The first continuation of each task, with what was asked and what was wanted."""
    for entry in entries:
        for sample in entry.get("samples", [])[:1]:
            yield ""
            for key in ("prompt", "reference", "written"):
                yield f"{key:<10}{' '.join(sample[key].split())}"
