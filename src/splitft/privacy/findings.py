"""What an audit found, as plain data, and what it means in one sentence.

    setting (cut, codec, noise) --attacks--> Finding, one an attack --worst--> verdict

Two ways lead to the text: hidden states at the cut, and what depends on the labels. A deeper cut or noise on
hidden states changes only the first; the text is as safe as the leakier of the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from splitft.privacy.metrics import Recovery

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
class Outcome:
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


def verdict(outcome: Outcome) -> str:
    """One sentence on what the server can read in this setting."""
    hidden, labels = outcome.worst("hidden"), outcome.worst("labels")
    recovered = {
        "hidden": None if hidden is None else hidden.recovery.tokens,
        "labels": None if labels is None else labels.recovery.tokens,
    }
    direct = any(one.attack == "labels" for one in outcome.findings)
    return sentence(outcome.setting, recovered["hidden"], recovered["labels"], direct)


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


def table_rows(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
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


def verdicts(outcomes: Sequence[Outcome]) -> list[str]:
    """One sentence a setting."""
    return [verdict(outcome) for outcome in outcomes]


def _or_none(share: float) -> float | None:
    return None if math.isnan(share) else round(share, 4)
