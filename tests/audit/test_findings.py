"""One sentence says what the worst attack of each way found."""

from __future__ import annotations

import pytest

from splitft.audit.findings import AuditResult, Finding, table_rows, verdict
from splitft.audit.recovery import Recovery
from splitft.privacy.known_leakage import Setting

PLAIN = Setting(cut=2, codec="bf16", noise=0.0, gradient_noise=0.0)


def found(attack: str, way: str, tokens: float) -> Finding:
    return Finding(PLAIN, attack, way, Recovery(tokens, tokens, tokens, 0.0, tokens, 100), 1.0)


def test_the_verdict_is_of_the_strongest_attack_of_each_way():
    findings = (
        found("linear", "hidden", 0.55),
        found("matching", "hidden", 0.91),
        found("head gradient", "labels", 1.0),
    )
    outcome = AuditResult(PLAIN, findings, loss=3.0, clean_loss=3.0)
    assert verdict(outcome) == (
        "At cut 2 (bf16) without noise, the server can read 9 of 10 tokens from the hidden states and "
        "all labelled tokens from the gradients that return."
    )
    assert outcome.worst().attack == "head gradient"
    assert outcome.worst("hidden").recovery.tokens == 0.91


def test_labels_that_travel_are_called_what_they_are():
    outcome = AuditResult(PLAIN, (found("labels", "labels", 1.0),), 3.0, 3.0)
    assert "every label, since labels are sent to it" in verdict(outcome)


def test_the_cost_is_the_relative_rise_of_perplexity():
    outcome = AuditResult(PLAIN, (found("linear", "hidden", 0.5),), loss=3.0 + 0.0487902, clean_loss=3.0)
    assert outcome.perplexity_cost == pytest.approx(0.05, abs=1e-6)
    assert table_rows([outcome])[0]["perplexity_cost"] == 0.05
