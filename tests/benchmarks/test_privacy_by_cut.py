"""The table of known figures has the strongest attacks, and known_leakage reads it."""

from __future__ import annotations

from privacy_by_cut import known_entries
from splitft.audit.findings import AuditResult, Finding
from splitft.audit.recovery import Recovery
from splitft.privacy import known_leakage
from splitft.privacy.known_leakage import Setting, known_recovery


def test_the_strongest_attack_of_each_way_is_stored_and_read_back(monkeypatch):
    setting = Setting(4, "bf16", 0.5, 2.0)

    def found(attack: str, way: str, tokens: float) -> Finding:
        return Finding(setting, attack, way, Recovery(tokens, tokens, tokens, 0.0, tokens, 100), 1.0)

    findings = found("linear", "hidden", 0.4), found("matching", "hidden", 0.8)
    result = AuditResult(setting, (*findings, found("head gradient", "labels", 0.9)), 3.0, 3.0)
    entries = known_entries([result])
    assert [(one["attack"], one["noise"]) for one in entries] == [("matching", 0.5), ("head gradient", 2.0)]
    monkeypatch.setattr(known_leakage, "_table", lambda: {"models": {"small": entries}})
    assert known_recovery("small", 4, "bf16", 0.5, way="hidden") == 0.8
    assert known_recovery("small", 4, "bf16", 0.5, 2.0) == 0.9
