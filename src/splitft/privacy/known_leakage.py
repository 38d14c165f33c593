"""Look up what audits have found for known models: in words, and as a bound on cuts.

    known.json: model -> entries (cut, codec, noise, way, recovered), with command, commit and date
    known_recovery(model, cut, codec, noise) -> share of tokens that the strongest attack reads, or None

    cut        1     2     4     8    15      an audit's table, measured or given as schedule.recovery
    recovery  .99   .95   .80   .42   .25     --shallowest_cut(max_recovery .5)--> cuts from 8 on

`known.json` is written by `benchmarks/privacy_by_cut.py --known`, never by hand. An audit holds for one
model, codec and noise, so a share is returned only where it was measured, or for a noise between two measured
ones: then it is the share at the lower noise, since more noise does not reveal more. Anything else is "not
audited", and is refused where a bound depends on it.

A cut that was not audited has the share of the nearest audited cut before it, since deeper cuts reveal less;
cuts before the first audited one are not allowed. An audit is a measurement, so a deeper cut may come out
worse by chance: a cut is allowed if it and every deeper audited one keep the bound.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from splitft.errors import ScheduleError
from splitft.specs import PrivacySpec

Way = Literal["hidden", "labels"]
"""How an attack reaches the text: hidden states at the cut, or what depends on the labels."""


@dataclass(frozen=True)
class Setting:
    """The parameters that an audit varies."""

    cut: int
    """k, blocks on the client."""
    codec: str
    """Codec of hidden states."""
    noise: float
    """`privacy.hidden.noise`; 0 for none."""
    gradient_noise: float
    """`privacy.gradient.noise`; 0 for none."""


# What was measured


def known_recovery(
    model: str,
    cut: int,
    codec: str = "bf16",
    noise: float = 0.0,
    gradient_noise: float = 0.0,
    way: Way | None = None,
) -> float | None:
    """Return the share of tokens that the strongest known attack reads; None if this was not audited.

    By default it is the higher share of both ways: hidden states at the cut (which depend on cut, codec and
    noise) and the labels behind returning gradients (which depend on `gradient_noise` alone).
    """
    ways = {
        "hidden": _looked_up(model, "hidden", noise, cut=cut, codec=codec),
        "labels": _looked_up(model, "labels", gradient_noise),
    }
    if way is not None:
        return ways[way]
    found = [share for share in ways.values() if share is not None]
    return max(found) if len(found) == len(ways) or max(found, default=0.0) >= 1.0 else None


def known_recoveries(
    model: str, codec: str = "bf16", noise: float = 0.0, gradient_noise: float = 0.0, way: Way | None = None
) -> dict[int, float]:
    """Return `known_recovery` of every cut that was audited."""
    cuts = sorted({entry["cut"] for entry in _entries(model) if entry["way"] == "hidden"})
    found = {cut: known_recovery(model, cut, codec, noise, gradient_noise, way) for cut in cuts}
    return {cut: share for cut, share in found.items() if share is not None}


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
    """Return the share measured at this noise, or at the nearest lower one if a higher was measured too."""
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


# In words


def known_sentence(model: str, setting: Setting, labels_travel: bool = False) -> str:
    """Say in one sentence what the server can read in this setting, or that it was not audited."""
    hidden = known_recovery(model, setting.cut, setting.codec, setting.noise, way="hidden")
    noise = setting.gradient_noise
    labels = 1.0 if labels_travel else known_recovery(model, 0, gradient_noise=noise, way="labels")
    said = leakage_sentence(setting, hidden, labels, labels_travel)
    if hidden is None and labels is not None:
        return f"{said} What it reads off the hidden states of this setting was not audited."
    return said


def leakage_sentence(
    setting: Setting, hidden: float | None, labels: float | None, labels_travel: bool = False
) -> str:
    """Say in one sentence which shares of hidden states and labels the server can read."""
    noise = f"with noise {setting.noise:g}" if setting.noise else "without noise"
    at = f"At cut {setting.cut} ({setting.codec}) {noise}"
    parts = []
    if hidden is not None:
        parts.append(f"{share_in_words(hidden)} tokens from the hidden states")
    if labels is not None and labels_travel:
        parts.append("every label, since labels are sent to it")
    elif labels is not None:
        other = setting.gradient_noise != setting.noise
        returned = f" (noise {setting.gradient_noise:g})" if other else ""
        parts.append(f"{share_in_words(labels)} labelled tokens from the gradients that return{returned}")
    return f"{at}, the server can read {' and '.join(parts)}." if parts else f"{at}: not audited."


def share_in_words(share: float) -> str:
    """Round a share to tenths in words, such as "9 of 10" or "all"."""
    if share >= 0.995:
        return "all"
    if share < 0.05:
        return "fewer than 1 of 20"
    tenths = round(10 * share)
    return f"{max(1, tenths)} of 10" if tenths < 10 else "more than 9 of 10"


# Of one run


def audited_recovery(
    model: str, codec: str, privacy: PrivacySpec, labels_travel: bool
) -> Mapping[int, float]:
    """Return the shares by cut for a run. Raises ScheduleError if no stored audit has its setting."""
    known = {}
    if not labels_travel and _audited_defences(privacy):
        known = known_recoveries(model, codec, privacy.hidden.noise, privacy.gradient.noise)
    if not known:
        raise ScheduleError(
            f"schedule.max_recovery: {model} was not audited with this codec and noise, so no cut is sure to "
            "keep it; run splitft audit and give its figures as schedule.recovery, or set schedule.min_cut"
        )
    return known


def audited_sentence(model: str, cut: int, codec: str, privacy: PrivacySpec, labels_travel: bool) -> str:
    """Say what the server can read in a run's setting according to stored audits, or "not audited"."""
    if not _audited_defences(privacy):
        return f"At cut {cut} with these defences: not audited."
    setting = Setting(cut, codec, privacy.hidden.noise, privacy.gradient.noise)
    return known_sentence(model, setting, labels_travel)


def _audited_defences(privacy: PrivacySpec) -> bool:
    """Return whether stored audits are of these defences: Gaussian noise, or none."""
    rows = (privacy.hidden.defence, privacy.gradient.defence)
    return privacy.labels.defence == "none" and all(one in ("none", "gaussian") for one in rows)


# As a bound on cuts


def shallowest_cut(recovery: Mapping[int, float], max_recovery: float, deepest: int) -> int:
    """Return the shallowest cut from which on the bound is kept.

    Raises ScheduleError, with the share of each cut, if none of 1 to `deepest` keeps it.
    """
    found = None
    for cut in sorted((cut for cut in recovery if 1 <= cut <= deepest), reverse=True):
        if recovery[cut] > max_recovery:
            break
        found = cut
    if found is None:
        shares = ", ".join(f"cut {cut} gives {recovery[cut]:.2f}" for cut in sorted(recovery))
        raise ScheduleError(
            f"schedule.max_recovery: no cut up to {deepest} keeps the tokens that can be recovered under "
            f"{max_recovery:g}: {shares}; give a higher bound, or audit with more noise (privacy.hidden)"
        )
    return found


def check_fixed_cuts(
    cuts: Mapping[str, int], floor: int, recovery: Mapping[int, float], bound: float
) -> None:
    """Raise ScheduleError, with the clients and a cut that fits, if a cut is shallower than `floor`."""
    shallow = [f"{name} cut {cut} ({_audited(recovery, cut)})" for name, cut in cuts.items() if cut < floor]
    if shallow:
        raise ScheduleError(
            f"schedule.max_recovery: {bound:g} of the tokens may be recovered, but {', '.join(shallow)}; "
            f"give clients.cuts of at least {floor} ({_audited(recovery, floor)}), or a higher bound"
        )


def _audited(recovery: Mapping[int, float], cut: int) -> str:
    known = [audited for audited in recovery if audited <= cut]
    return f"{recovery[max(known)]:.2f} by the audit" if known else "not audited"
