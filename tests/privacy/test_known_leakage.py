"""Stored audits answer for what was measured, and for nothing else."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest

from splitft.audit.findings import AuditResult, Finding, to_known
from splitft.audit.recovery import Recovery
from splitft.privacy import known_leakage as known
from splitft.privacy.known_leakage import Setting, known_sentence, recoveries, recovery


def outcome(cut: int, noise: float, hidden: float, labels: float) -> AuditResult:
    setting = Setting(cut, "bf16", noise, noise)

    def found(attack: str, way: str, tokens: float) -> Finding:
        return Finding(setting, attack, way, Recovery(tokens, tokens, tokens, 0.0, tokens, 100), 1.0)

    findings = (found("linear", "hidden", hidden / 2), found("matching", "hidden", hidden))
    return AuditResult(setting, (*findings, found("head gradient", "labels", labels)), 3.0, 3.0)


@pytest.fixture(autouse=True)
def stored(monkeypatch):
    outcomes = [outcome(2, 0.0, 1.0, 1.0), outcome(4, 0.0, 0.8, 1.0), outcome(2, 1.0, 0.5, 0.6)]
    table = to_known(outcomes, {"model": "small", "commit": "abc", "date": "today"})
    monkeypatch.setattr(known, "_table", lambda: table)
    return table


def test_the_strongest_attack_is_stored_with_where_it_comes_from(stored):
    assert stored["story"]["commit"] == "abc"
    assert {entry["attack"] for entry in stored["models"]["small"]} == {"matching", "head gradient"}


def test_what_was_measured_is_found_by_way_and_as_the_worse_of_both():
    assert recovery("small", 4, way="hidden") == 0.8
    assert recovery("small", 4) == 1.0  # the labels are read off the gradients
    assert recovery("small", 2, noise=1.0, gradient_noise=1.0) == 0.6


def test_between_two_noises_the_lower_one_s_figure_stands():
    assert recovery("small", 2, noise=0.3, way="hidden") == 1.0
    assert recovery("small", 2, noise=2.0, way="hidden") is None  # beyond what was measured


def test_what_was_not_audited_is_unknown():
    assert recovery("large", 2) is None
    assert recovery("small", 3, way="hidden") is None
    assert recovery("small", 2, codec="int4", way="hidden") is None
    assert recovery("small", 3, noise=1.0, gradient_noise=1.0) is None  # one way known, the other not


def test_a_way_that_reads_everything_settles_the_other():
    assert recovery("small", 3) == 1.0


def test_bounds_get_the_figures_of_every_audited_cut():
    assert recoveries("small") == {2: 1.0, 4: 1.0}
    assert recoveries("small", way="hidden") == {2: 1.0, 4: 0.8}
    assert recoveries("large") == {}


def test_a_run_says_what_is_known_of_its_setting():
    assert known_sentence("small", Setting(4, "bf16", 0.0, 0.0)) == (
        "At cut 4 (bf16) without noise, the server can read 8 of 10 tokens from the hidden states and all "
        "labelled tokens from the gradients that return."
    )
    assert "not audited" in known_sentence("large", Setting(4, "bf16", 0.0, 0.0))
    assert "every label" in known_sentence("large", Setting(4, "bf16", 0.0, 0.0), labels_travel=True)


def test_a_setting_of_which_only_the_labels_are_known_is_not_told_as_a_whole():
    assert known_sentence("small", Setting(3, "bf16", 0.0, 0.0)) == (
        "At cut 3 (bf16) without noise, the server can read all labelled tokens from the gradients that "
        "return. What it reads off the hidden states of this setting was not audited."
    )


def test_the_package_s_own_table_says_where_its_figures_come_from():
    stored = json.loads(files("splitft.privacy").joinpath("known.json").read_text(encoding="utf-8"))
    assert {"command", "commit", "date", "text", "public"} <= stored["story"].keys()
    entries = [entry for model in stored["models"].values() for entry in model]
    assert all(0 <= entry["recovered"] <= 1 and entry["tokens"] > 0 for entry in entries)
