"""The findings of an audit, as plain data and in one sentence a setting.

    setting (cut, codec, noise) --attacks--> Finding, one an attack --worst--> verdict

An attack reaches the text by hidden states at the cut, or by what depends on the labels. A deeper cut or
noise on hidden states changes only the first; the text is as safe as the leakier of the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from splitft.audit.recovery import Recovery
from splitft.privacy.known_leakage import Setting, Way, leakage_sentence


@dataclass(frozen=True)
class Finding:
    """Recovery of one attack in one setting."""

    setting: Setting
    attack: str
    way: Way
    """It read whole texts off hidden states, or the labelled part."""
    recovery: Recovery
    seconds: float
    """Duration of the attack, learning included."""


@dataclass(frozen=True)
class AuditResult:
    """Findings of all attacks in one setting, and the cost of the setting."""

    setting: Setting
    findings: tuple[Finding, ...]
    loss: float
    """Held-out loss in nats per token with the defences on, before training with them."""
    clean_loss: float
    """The same loss without noise, at the same cut."""

    @property
    def perplexity_cost(self) -> float:
        """Relative rise of perplexity: 0.05 is 5 %."""
        return math.expm1(min(700.0, self.loss - self.clean_loss))

    def worst(self, way: Way | None = None) -> Finding | None:
        """Return the attack that read most, of one way or of both."""
        fitting = [one for one in self.findings if way is None or one.way == way]
        return max(fitting, key=lambda one: one.recovery.tokens, default=None)


def verdict(result: AuditResult) -> str:
    """Say in one sentence what the server can read in this setting."""
    hidden, labels = result.worst("hidden"), result.worst("labels")
    return leakage_sentence(
        result.setting,
        None if hidden is None else hidden.recovery.tokens,
        None if labels is None else labels.recovery.tokens,
        labels_travel=any(one.attack == "labels" for one in result.findings),
    )


def table_rows(results: Iterable[AuditResult]) -> list[dict[str, Any]]:
    """Return one row for each setting and attack, as plain data."""
    rows: list[dict[str, Any]] = []
    for result in results:
        for one in result.findings:
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
                "perplexity_cost": round(result.perplexity_cost, 4),
                "seconds": round(one.seconds, 2),
            })  # fmt: skip
    return rows


def _or_none(share: float) -> float | None:
    return None if math.isnan(share) else round(share, 4)
