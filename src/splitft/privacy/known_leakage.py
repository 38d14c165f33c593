"""What audits have found for known models, so that a run can say what its setting gives away.

    known.json: model -> entries (cut, codec, noise, way, recovered), with command, commit and date
    recovery(model, cut, codec, noise) -> share of tokens that the strongest attack reads, or None

`known.json` is written by `benchmarks/privacy_by_cut.py --known`; nothing in it is typed by hand. A figure is
returned only where it was measured, or for a noise between two measured ones, where that of the lower noise
stands: more noise does not let more be read. What was not audited is None, and a run says "not audited".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

Way = Literal["hidden", "labels"]


@dataclass(frozen=True)
class Setting:
    """What an audit varies."""

    cut: int
    """k, blocks on the client."""
    codec: str
    """Codec of hidden states."""
    noise: float
    """`privacy.hidden.noise`; 0 for none."""
    gradient_noise: float
    """`privacy.gradient.noise`; 0 for none."""


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


def sentence(setting: Setting, hidden: float | None, labels: float | None, direct: bool = False) -> str:
    """The same from figures alone; `direct` if the labels travel as they are."""
    noise = f"with noise {setting.noise:g}" if setting.noise else "without noise"
    at = f"At cut {setting.cut} ({setting.codec}) {noise}"
    parts = []
    if hidden is not None:
        parts.append(f"{in_ten(hidden)} tokens from the hidden states")
    if labels is not None and direct:
        parts.append("every label, since labels are sent to it")
    elif labels is not None:
        other = setting.gradient_noise != setting.noise
        returned = f" (noise {setting.gradient_noise:g})" if other else ""
        parts.append(f"{in_ten(labels)} labelled tokens from the gradients that return{returned}")
    return f"{at}, the server can read {' and '.join(parts)}." if parts else f"{at}: not audited."


def in_ten(share: float) -> str:
    """A share as people say it: 9 of 10, all, almost none."""
    if share >= 0.995:
        return "all"
    if share < 0.05:
        return "fewer than 1 of 20"
    tenths = round(10 * share)
    return f"{max(1, tenths)} of 10" if tenths < 10 else "more than 9 of 10"


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
