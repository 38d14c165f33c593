"""What an audit found, as plain data, and what it means in one sentence.

    setting (cut, codec, noise) --attacks--> Finding, one an attack --worst--> verdict

Two ways lead to the text: hidden states at the cut, and what depends on the labels. A deeper cut or noise on
hidden states changes only the first; the text is as safe as the leakier of the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from splitft.audit.recovery import Recovery
from splitft.privacy.known_leakage import Setting, Way, sentence


@dataclass(frozen=True)
class Finding:
    """What one attack recovered in one setting."""

    setting: Setting
    attack: str
    way: Way
    """Whether it read whole texts off hidden states, or the labelled part."""
    recovery: Recovery
    seconds: float
    """What the attack took, learning included."""


@dataclass(frozen=True)
class AuditResult:
    """All attacks in one setting, and what the setting costs."""

    setting: Setting
    findings: tuple[Finding, ...]
    loss: float
    """Held-out loss in nats per token with the defences on, before training with them."""
    clean_loss: float
    """Without noise, at the same cut."""

    @property
    def perplexity_cost(self) -> float:
        """Relative rise of perplexity: 0.05 is 5 %."""
        return math.expm1(min(700.0, self.loss - self.clean_loss))

    def worst(self, way: Way | None = None) -> Finding | None:
        """The attack that read most, of one way or of both."""
        fitting = [one for one in self.findings if way is None or one.way == way]
        return max(fitting, key=lambda one: one.recovery.tokens, default=None)


def verdict(outcome: AuditResult) -> str:
    """One sentence on what the server can read in this setting."""
    hidden, labels = outcome.worst("hidden"), outcome.worst("labels")
    recovered = {
        "hidden": None if hidden is None else hidden.recovery.tokens,
        "labels": None if labels is None else labels.recovery.tokens,
    }
    direct = any(one.attack == "labels" for one in outcome.findings)
    return sentence(outcome.setting, recovered["hidden"], recovered["labels"], direct)


def table_rows(outcomes: Iterable[AuditResult]) -> list[dict[str, Any]]:
    """One row a setting and attack, as plain data."""
    rows: list[dict[str, Any]] = []
    for outcome in outcomes:
        for one in outcome.findings:
            recovery = one.recovery
            rows.append({
                "cut": one.setting.cut,
                "codec": one.setting.codec,
                "noise": one.setting.noise,
                "gradient_noise": one.setting.gradient_noise,
                "attack": one.attack,
                "way": one.way,
                "tokens": round(recovery.tokens, 4),
                "standard_error": round(recovery.error, 4),
                "rare": _or_none(recovery.rare),
                "function": _or_none(recovery.function),
                "sentences": round(recovery.sentences, 4),
                "rouge_l": round(recovery.rouge_l, 4),
                "count": recovery.count,
                "perplexity_cost": round(outcome.perplexity_cost, 4),
                "seconds": round(one.seconds, 2),
            })  # fmt: skip
    return rows


def verdicts(outcomes: Sequence[AuditResult]) -> list[str]:
    """One sentence a setting."""
    return [verdict(outcome) for outcome in outcomes]


def to_known(outcomes: Iterable[AuditResult], story: Mapping[str, Any]) -> dict[str, Any]:
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


def _or_none(share: float) -> float | None:
    return None if math.isnan(share) else round(share, 4)
