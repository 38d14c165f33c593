"""What audits have found for known models, so that a run can say what its setting gives away.

    known.json: model -> entries (cut, codec, noise, way, recovered), with command, commit and date
    recovery(model, cut, codec, noise) -> share of tokens that the strongest attack reads, or None

`known.json` is written by `benchmarks/privacy_by_cut.py --known`; nothing in it is typed by hand. A figure is
returned only where it was measured, or for a noise between two measured ones, where that of the lower noise
stands: more noise does not let more be read. What was not audited is None, and a run says "not audited".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from splitft.privacy.findings import Outcome, Setting, Way, sentence


def recovery(
    model: str,
    cut: int,
    codec: str = "bf16",
    noise: float = 0.0,
    gradient_noise: float = 0.0,
    way: Way | None = None,
) -> float | None:
    """Share of tokens that the strongest known attack reads; None if the setting was not audited.

    By default it is the worse of both ways: hidden states at the cut (which depend on cut, codec and noise)
    and the labels behind returning gradients (which depend on `gradient_noise` alone).
    """
    ways = {
        "hidden": _looked_up(model, "hidden", noise, cut=cut, codec=codec),
        "labels": _looked_up(model, "labels", gradient_noise),
    }
    if way is not None:
        return ways[way]
    found = [share for share in ways.values() if share is not None]
    return max(found) if len(found) == len(ways) or max(found, default=0.0) >= 1.0 else None


def recoveries(
    model: str, codec: str = "bf16", noise: float = 0.0, gradient_noise: float = 0.0, way: Way | None = None
) -> dict[int, float]:
    """`recovery` for every cut that was audited."""
    cuts = sorted({entry["cut"] for entry in _entries(model) if entry["way"] == "hidden"})
    found = {cut: recovery(model, cut, codec, noise, gradient_noise, way) for cut in cuts}
    return {cut: share for cut, share in found.items() if share is not None}


def known_sentence(model: str, setting: Setting, labels_travel: bool = False) -> str:
    """What the server can read in this setting, in one sentence; or that it was not audited."""
    hidden = recovery(model, setting.cut, setting.codec, setting.noise, way="hidden")
    labels = 1.0 if labels_travel else recovery(model, 0, gradient_noise=setting.gradient_noise, way="labels")
    said = sentence(setting, hidden, labels, direct=labels_travel)
    if hidden is None and labels is not None:
        return f"{said} What it reads off the hidden states of this setting was not audited."
    return said


def to_known(outcomes: Iterable[Outcome], story: Mapping[str, Any]) -> dict[str, Any]:
    """The strongest attacks' figures in the form of `known.json`; `story` says where they come from."""
    entries: list[dict[str, Any]] = []
    for outcome in outcomes:
        setting = outcome.setting
        for way, noise in (("hidden", setting.noise), ("labels", setting.gradient_noise)):
            worst = outcome.worst("hidden" if way == "hidden" else "labels")
            if worst is not None:
                entries.append({
                    "cut": setting.cut,
                    "codec": setting.codec,
                    "noise": noise,
                    "way": way,
                    "attack": worst.attack,
                    "recovered": round(worst.recovery.tokens, 4),
                    "tokens": worst.recovery.count,
                    "perplexity_cost": round(outcome.perplexity_cost, 4),
                })  # fmt: skip
    return {"models": {str(story["model"]): entries}, "story": dict(story)}


@cache
def _table() -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(
        files("splitft.privacy").joinpath("known.json").read_text(encoding="utf-8")
    )
    return found


def _entries(model: str) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = _table()["models"].get(model, [])
    return found


def _looked_up(model: str, way: str, noise: float, **place: object) -> float | None:
    """Measured at this noise, or for one between two measured ones the figure of the lower."""
    fitting = [
        entry
        for entry in _entries(model)
        if entry["way"] == way and all(entry[key] == value for key, value in place.items())
    ]
    exact = [entry["recovered"] for entry in fitting if entry["noise"] == noise]
    if exact:
        return float(max(exact))
    lower = [entry for entry in fitting if entry["noise"] < noise]
    higher = [entry for entry in fitting if entry["noise"] > noise]
    if not lower or not higher:
        return None
    nearest = max(entry["noise"] for entry in lower)
    return float(max(entry["recovered"] for entry in lower if entry["noise"] == nearest))
