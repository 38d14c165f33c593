"""An audit records a real step, and its attacks read from bytes alone what the client never meant to say."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

import splitft
from laws.federations import write_text
from runs import invoke, settings
from splitft.audit.attacks import ATTACKS, Attack, Effort
from splitft.audit.auditor import SHORT, audit, settings_of
from splitft.audit.public_text import public_tokens
from splitft.audit.recording import observations, record, recorded_config
from splitft.config import dump, from_mapping
from splitft.errors import DataError, PluginError
from splitft.model import open_model
from splitft.privacy.known_leakage import Setting
from splitft.run.inputs import gather
from splitft.specs import ModelSpec

TINY = replace(
    SHORT,
    texts=3,
    tokens=24,
    public=2048,
    attacks=tuple(name for name in ATTACKS if ATTACKS[name].way == "hidden"),
    effort=Effort(whole=True),
    inverter_steps=2,
)
PLAIN = Setting(2, "bf16", 0.0, 0.0)


@pytest.fixture
def config(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("SPLITFT_CACHE", str(tmp_path / "cache"))
    text = write_text(tmp_path / "notes.jsonl")
    return from_mapping(settings(tiny_llama, text, training={"lr": 5e-4}))


def reads(found) -> dict[str, float]:
    return {one.attack: one.recovery.tokens for one in found.results[0].findings}


@pytest.mark.parametrize("cut", [1, 3])
def test_matching_reads_every_token_off_the_hidden_states(config, cut):
    depth = replace(TINY, attacks=("linear", "matching"))
    found = audit(config, depth, settings=[Setting(cut, "bf16", 0.0, 0.0)])
    assert reads(found)["matching"] == 1.0
    assert found.results[0].perplexity_cost == 0.0


def test_every_attack_on_hidden_states_and_gradients_reports(config):
    depth = replace(TINY, attacks=tuple(ATTACKS), tokens=16)
    found = reads(audit(config, depth, settings=[PLAIN]))
    assert set(found) == set(ATTACKS) - {"labels"}  # which did not travel
    assert found["head gradient"] == 1.0
    assert found["matching"] >= found["linear"] >= 0


def test_labels_on_the_server_are_simply_read(config):
    split = config.split.model_copy(update={"labels": "server"})
    depth = replace(TINY, attacks=("head gradient", "labels"))
    found = audit(config.model_copy(update={"split": split}), depth, settings=[PLAIN])
    assert reads(found) == {"labels": 1.0}
    assert "every label, since labels are sent to it" in found.to_json()["verdicts"][0]


def test_noise_makes_reading_harder_and_costs_perplexity(config):
    depth = replace(TINY, attacks=("matching", "head gradient"))
    found = audit(config, depth, settings=[PLAIN, Setting(2, "bf16", 30.0, 30.0)])
    plain, noisy = found.results
    for way in ("hidden", "labels"):
        assert noisy.worst(way).recovery.tokens < plain.worst(way).recovery.tokens / 2
    assert noisy.loss != plain.loss == plain.clean_loss


def test_one_label_is_read_off_the_loss_that_is_sent_and_no_loss_is_sent_with_noise(config):
    depth = replace(TINY, texts=1, tokens=2, public=256, attacks=("mean loss", "head gradient"))
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "float32"})})
    plain, noisy = audit(config, depth, settings=[PLAIN, Setting(2, "bf16", 0.0, 8.0)]).results
    read = {one.attack: one.recovery for one in plain.findings}
    assert (read["mean loss"].tokens, read["mean loss"].count) == (1.0, 2)  # two steps of one label
    assert [one.attack for one in noisy.findings] == ["head gradient"]
    assert noisy.loss == pytest.approx(plain.loss, rel=1e-6)  # measured at the client, without the noise


def test_a_recording_is_of_frames_and_a_run_s_own_adapters(config, tmp_path):
    fast = config.training.model_copy(update={"lr": 1e-2, "rounds": 1})
    run = splitft.train(config.model_copy(update={"training": fast}), tmp_path / "run")
    found = audit(run.folder, replace(TINY, attacks=("matching",)), settings=[PLAIN])
    assert reads(found)["matching"] > 0.9  # in the second step the client's adapters have moved on


def test_what_the_attacks_get_is_decoded_from_bytes(config):
    small = recorded_config(config, 2, 2, 3)
    gathered = gather(small)
    recording = record(small, gathered)
    assert [one.step for one in recording.batches] == [0, 1]
    assert sum(map(len, recording.texts)) == sum(len(one.hidden) for one in recording.batches)
    for one in recording.batches:
        assert one.labels is None
        assert len(one.labelled_rows()) == len(one.head_gradient) == len(one.last)
        assert torch.equal(one.hidden, one.hidden.bfloat16().float())  # the codec's rounding is in it
    assert observations([], recording.serializer) == []


def test_the_run_s_own_settings_come_first_and_only_known_codecs(config):
    found = settings_of(config, replace(TINY, cuts=(3, 9), codecs=("bf16", "morse"), noises=(0.0, 1.0)), 4)
    assert [one.cut for one in found[:3]] == [1, 2, 3]
    assert Setting(1, "bf16", 1.0, 1.0) in found
    assert all(one.cut < 4 and one.codec == "bf16" for one in found)
    assert len(found) == len(set(found))


def test_the_attacker_does_not_learn_on_the_audited_text(tiny_llama):
    model = open_model(ModelSpec(name=str(tiny_llama)))
    with pytest.raises(DataError, match="audited text"):
        public_tokens(model, "notes.jsonl", "notes.jsonl", 1000)
    tokens, source = public_tokens(model, None, "python-docs", 1000)
    assert source == "docstrings of Python's library"
    assert tokens.shape == (1000 // 64, 64)
    assert public_tokens(model, None, "notes.jsonl", 1000)[1] == "python-docs"


def test_the_verb_says_verdicts_and_writes_table_page_and_json(config, tmp_path, monkeypatch):
    from splitft.audit import auditor

    monkeypatch.setattr(auditor, "SHORT", replace(TINY, cuts=(), noises=(), codecs=(), attacks=("matching",)))
    one_cut = config.model_copy(update={"clients": config.clients.model_copy(update={"cuts": 1})})
    file = tmp_path / "run.yaml"
    file.write_text(dump(one_cut), encoding="utf-8")
    shown = invoke("audit", file, "--html", tmp_path / "leaks.html")
    assert shown.exit_code == 0, shown.output
    assert "At cut 1 (bf16) without noise, the server can read all tokens" in shown.output
    assert "Recovery against cost" in (tmp_path / "leaks.html").read_text(encoding="utf-8")
    data = json.loads(invoke("audit", file, "--json").stdout)
    assert [row["cut"] for row in data["rows"]] == [1]
    assert data["rows"][0]["tokens"] == 1.0
    assert invoke("audit", tmp_path / "none.yaml").exit_code == 2


PLUGIN = """
from splitft.audit.attacks.suite import ATTACKS, Attack

def first_token(attacker, batches):
    return [[0] * len(rows) for batch in batches for rows in batch.sequences()]

ATTACKS.add("zeros", Attack("hidden", first_token))
"""


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(ATTACKS, "_things", dict(ATTACKS._things))
    yield ATTACKS
    for name in [name for name in sys.modules if name.startswith("splitft_plugin_")]:
        del sys.modules[name]


def test_a_plug_in_attack_is_run_and_shown_like_a_built_in_one(config, tmp_path, monkeypatch, registry):
    from splitft.audit import auditor

    monkeypatch.setattr(auditor, "SHORT", replace(TINY, cuts=(), noises=(), codecs=(), attacks=()))
    (tmp_path / "mine.py").write_text(PLUGIN, encoding="utf-8")
    one_cut = config.model_copy(update={"clients": config.clients.model_copy(update={"cuts": 1})})
    file = tmp_path / "run.yaml"
    file.write_text(dump(one_cut).replace("plugins: []", "plugins: [mine.py]"), encoding="utf-8")
    page = tmp_path / "leaks.html"
    shown = invoke("audit", file, "--html", page)
    assert shown.exit_code == 0, shown.output
    attacks = [row for row in registry if row != "labels" and registry[row].in_short]
    assert all(name in shown.stdout for name in attacks)
    assert attacks[-1] == "zeros"
    assert "<td class=left>zeros</td>" in page.read_text(encoding="utf-8")
    chosen = invoke("audit", file, "--attacks", "zeros, head gradient", "--json")
    assert [row["attack"] for row in json.loads(chosen.stdout)["rows"]] == ["zeros", "head gradient"]
    refused = invoke("audit", file, "--attacks", "zero")
    assert (refused.exit_code, "no attack is called 'zero'; did you mean zeros?" in refused.output) == (
        2,
        True,
    )


def test_an_attack_that_returns_other_lengths_is_refused(config, registry):
    registry.add("short", Attack("labels", lambda attacker, batches: [[1]]))
    with pytest.raises(PluginError, match=r"the attack 'short' returned texts of \[1\] tokens"):
        audit(config, replace(TINY, attacks=("short",)), settings=[PLAIN])


@pytest.mark.parametrize("facts", [{"way": "gradient"}, {"way": "labels", "needs": ("loss",)}])
def test_an_attack_of_an_unknown_way_or_need_is_refused(facts):
    with pytest.raises(PluginError, match="way is hidden or labels, needs are among labels, last"):
        Attack(run=len, **facts)


def test_a_run_begins_with_what_is_known_of_its_setting(config, tmp_path):
    run = splitft.train(config, tmp_path / "run")
    assert run.summary["privacy"].endswith("At cut 1 (bf16) without noise: not audited.")
