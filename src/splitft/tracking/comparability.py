"""Check that runs can be compared: the same model and the same text.

    [(name, summary), ...] --differences--> sentences, one for each pair of runs that does not compare

Text is compared by the fingerprints of the training and the held-out examples; their division among the
clients may differ. Each seed draws its own held-out text, so runs are compared within a seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_MODULUS = 1 << 128


def common_fingerprint(prints: Iterable[str]) -> str | None:
    """Return one fingerprint for the texts of several clients; None if one of theirs is unknown."""
    known = list(prints)
    if not known or not all(known):
        return None
    return f"{sum(int(one, 16) for one in known) % _MODULUS:032x}"


def differences(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Return one sentence for each run that does not compare with the first run of its seed."""
    first: dict[int, tuple[str, Mapping[str, Any]]] = {}
    found = []
    for name, summary in runs:
        if summary["seed"] not in first:
            first[summary["seed"]] = (name, summary)
            continue
        other, known = first[summary["seed"]]
        if difference := _difference(known, summary):
            found.append(f"{other} and {name} {difference}")
    models = {summary["model"]: name for name, summary in runs}
    if len(models) > 1:
        listed = ", ".join(f"{model} ({name})" for model, name in models.items())
        found.insert(0, f"the runs trained different models: {listed}")
    return found


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Describe how two runs of one seed differ; empty if they compare, or have no fingerprints."""
    if one["model"] != other["model"]:
        return ""  # reported once for all runs
    parts = []
    for key, how, counted in (
        ("held_out", "were evaluated on different text", "eval_examples"),
        ("trained_on", "trained on different text", "train_examples"),
    ):
        prints = [
            common_fingerprint(client.get(key, "") for client in run["clients"]) for run in (one, other)
        ]
        if None not in prints and prints[0] != prints[1]:
            counts = [sum(client[counted] for client in run["clients"]) for run in (one, other)]
            parts.append(f"{how} ({counts[0]:,} and {counts[1]:,} examples)")
    return " and ".join(parts)
