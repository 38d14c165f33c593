"""What a data owner forbids does not happen, and both sides say so."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.network import deployed
from laws.federations import federation, write_text
from runs import invoke, settings
from splitft.config import from_mapping
from splitft.deploy.manifest import manifest_of, tensors_of
from splitft.deploy.run_terms import load_run_terms
from splitft.deploy.server.registration import unfit
from splitft.deploy.server.setup import open_server
from splitft.deploy.site.policy import SitePolicy, load_site, refusals, site_template
from splitft.deploy.site.setup import open_site
from splitft.errors import ConfigError, ForbiddenError
from splitft.specs import SiteSpec
from splitft.specs.codecs import CODECS, codecs_for

CUTS = [1, 2, 3]
NAMES = ("client-1", "client-2", "client-3")
BOUNDED = {"bounded": "bounded:rel=0.01"}
PHONE = {
    "block_forward_ms_per_token": 1.0, "block_backward_ms_per_token": 2.0, "head_ms_per_token": 1.0,
}  # fmt: skip
NAMED = sorted(set(CODECS) - {"temporal"})


def site(**sections) -> SiteSpec:
    return SiteSpec.model_validate(sections)


OPEN = site(text={"source": "python-docs"}, allows={"labels": True})


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


@pytest.fixture
def config(tiny_llama, text):
    return from_mapping(settings(tiny_llama, text, aggregate={"rule": "zero-pad"}))


# --- the file -------------------------------------------------------------------------------------


def test_the_file_to_start_from_has_the_defaults(tmp_path):
    (tmp_path / "site.yaml").write_text(site_template(), encoding="utf-8")
    assert load_site(tmp_path / "site.yaml") == SiteSpec()
    assert max(map(len, site_template().splitlines())) <= 120


def test_an_empty_section_is_as_good_as_none(tmp_path):
    (tmp_path / "site.yaml").write_text("bounds:\ntext: {source: notes.jsonl}\n", encoding="utf-8")
    assert load_site(tmp_path / "site.yaml") == site(text={"source": "notes.jsonl"})


def test_all_faults_of_a_file_are_told_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.yaml").write_text(
        "bounds: {min_cut: 0}\nallows:\n  hiden: [int8]\n  gradient: [int9]\nmin_cut: 3\n"
        "model: {trusted: {model.safetensors: abc}}\n",
        encoding="utf-8",
    )
    with pytest.raises(ConfigError) as caught:
        load_site("site.yaml")
    lines = str(caught.value).splitlines()
    assert sorted(line.split(":")[1] for line in lines) == ["1", "3", "4", "5", "6"]
    assert "site.yaml:1: bounds.min_cut: found 0; give a whole number, at least 1" in lines
    assert "site.yaml:3: allows.hiden: no such key; did you mean hidden?" in lines
    assert "site.yaml:5: min_cut: no such key here; did you mean bounds.min_cut?" in lines


def test_the_verb_writes_a_file_and_holds_it_against_a_run(tmp_path, tiny_llama, text):
    run, own = tmp_path / "run.yaml", tmp_path / "site.yaml"
    run.write_text(f"data: {{source: {text}}}\nsplit: {{labels: server}}\n", encoding="utf-8")
    assert invoke("deploy", "site", own).exit_code == 0
    assert invoke("deploy", "site", own).exit_code == 2
    assert invoke("deploy", "site", own, "--check").exit_code == 0
    declined = invoke("deploy", "site", own, "--check", "--run", run)
    assert declined.exit_code == 2
    assert "allows.labels" in declined.stderr
    assert "text.source" in declined.stderr


# --- what is forbidden ----------------------------------------------------------------------------


@given(
    labels=st.sampled_from(["client", "server"]),
    may_leave=st.booleans(),
    asked=st.fixed_dictionaries(
        {
            "hidden": st.sampled_from(NAMED),
            "gradient": st.sampled_from(NAMED),
            "adapter": st.sampled_from(codecs_for("adapter")),
        }
    ),
    allowed=st.fixed_dictionaries(
        dict.fromkeys(("hidden", "gradient", "adapter"), st.none() | st.lists(st.sampled_from(NAMED)))
    ),
    cut=st.none() | st.integers(1, 5),
    least=st.integers(1, 5),
)
@pytest.mark.hostile(
    "a run asks for labels, codecs or cuts that a site's file forbids",
    "the site declines just what its file forbids",
)
def test_a_site_declines_just_what_its_file_forbids(labels, may_leave, asked, allowed, cut, least):
    wire = {role: BOUNDED.get(codec, codec) for role, codec in asked.items()}
    run = from_mapping({"split": {"labels": labels}, "wire": wire})
    own = site(allows={"labels": may_leave, **allowed}, bounds={"min_cut": least})
    found = refusals(own, run, cut)
    forbidden = {role for role in asked if allowed[role] is not None and asked[role] not in allowed[role]}
    assert {role for role in asked if any(f"wire.{role}" in reason for reason in found)} == forbidden
    assert any("allows.labels" in reason for reason in found) == (labels == "server" and not may_leave)
    assert any("min_cut" in reason for reason in found) == (cut is not None and cut < least)
    expected = len(forbidden) + (labels == "server" and not may_leave) + (cut is not None and cut < least)
    assert len(found) == expected


@pytest.mark.parametrize("source", ["/etc/passwd", "notes.jsonl", "someone/dataset"])
@pytest.mark.hostile("a run asks a site to read {source}", "the site declines")
def test_a_run_cannot_say_what_is_read_on_a_site(source):
    run = from_mapping({"data": {"source": source}})
    assert "text.source" in refusals(SiteSpec(), run, None)[0]
    assert refusals(OPEN, run, None) == ()


def test_a_file_that_forbids_nothing_asked_for_declines_nothing():
    assert refusals(SiteSpec(), from_mapping({}), 1) == ()


# --- a site of a run ------------------------------------------------------------------------------


def test_a_site_trains_on_all_of_its_own_text(config, tmp_path):
    own = write_text(tmp_path / "own.jsonl", examples=17, seed=5)
    party = open_site(config, "client-2", site(text={"source": str(own)}))
    assert party.register.client == "client-2"
    assert 0 < party.register.train_examples + party.register.eval_examples <= 17
    assert party.open_client(2).plan.cut == 2
    everybody = open_site(config, "client-2")
    assert everybody.register.train_examples < 40


def test_a_site_declines_before_it_reads_anything(config, tmp_path):
    gone = site(text={"source": str(tmp_path / "gone.jsonl")}, bounds={"min_cut": 2})
    with pytest.raises(ForbiddenError, match="the cut is 1, and this site takes part from 2 on"):
        open_site(config, "client-1", gone)


def test_a_cut_that_does_not_fit_the_memory_given_is_declined(config, text):
    own = {"source": str(text)}
    with pytest.raises(ForbiddenError, match=r"this site gives 1e-06 GB \(machine.memory_gb\)"):
        open_site(config, "client-2", site(text=own, machine={"memory_gb": 1e-6}))
    register = open_site(config, "client-2", site(text=own, machine={"memory_gb": 3})).register
    assert register.device["memory_gb"] == 3


def test_the_server_plans_with_what_sites_tell(config, text):
    auto = config.model_copy(
        update={
            "schedule": config.schedule.model_copy(update={"controller": "resources"}),
            "clients": config.clients.model_copy(update={"cuts": "auto"}),
        }
    )
    own = {"source": str(text)}
    parties = [
        open_site(auto, "client-1", site(text=own, bounds={"min_cut": 3})),
        open_site(auto, "client-2", site(text=own, machine={"device": "phone", "memory_gb": 4})),
        open_site(auto, "client-3", site(text=own)),
    ]
    registered = {party.register.client: party.register for party in parties}
    ready = open_server(load_run_terms(auto), registered)
    assert ready.cuts["client-1"] == 3
    assert set(ready.cuts) == set(NAMES)
    devices = {one.name: one.device.memory_bytes for one in ready.schedule.fleet.clients}
    assert devices["client-2"] == pytest.approx(4e9)
    small = registered["client-3"].model_copy(
        update={"device": {**registered["client-2"].device, "memory_gb": 1e-6}}
    )
    fewer = open_server(load_run_terms(auto), {**registered, "client-3": small})
    assert set(fewer.cuts) == {"client-1", "client-2"}
    assert "client-3" in fewer.left_out


def test_a_site_whose_shallowest_cut_is_deeper_than_the_run_goes_stops_nobody_else(config, text):
    register = open_site(config, "client-2", site(text={"source": str(text)})).register
    assert unfit(config, 4, "client-2", register) is None
    for device in ({"memory_gb": 1.0}, {"speed": 2.0}, {**PHONE, "memory_gb": 1e300}):
        assert "it describes a machine" in str(
            unfit(config, 4, "client-2", register.model_copy(update={"device": device}))
        )
    deeper = register.model_copy(update={"min_cut": 3})
    assert "from 3 on, and this run goes to 2" in str(unfit(config, 4, "client-2", deeper))


def test_a_site_adds_the_noise_that_it_insists_on(config, text):
    own = {"source": str(text)}
    party = open_site(config, "client-2", site(text=own, bounds={"min_noise": 0.5}))
    assert party.open_client(2)._defence.privacy.hidden.noise == 0.5


def test_a_site_that_declines_is_out_and_the_others_finish(tiny_llama, text, caplog):
    prepared = federation(tiny_llama, text, CUTS, training={"rounds": 2, "steps": 2})
    strict = SitePolicy(site(bounds={"min_cut": 3}), prepared.model, head=True)
    lax = SitePolicy(SiteSpec(), prepared.model, head=True)
    policies = {"client-1": lax, "client-2": strict, "client-3": lax}
    with caplog.at_level(logging.WARNING, logger="splitft.deploy"):
        outcome = deployed(prepared, policies=policies, manifest=manifest_of(prepared.model))
    assert outcome.error is None
    assert outcome.participants() == [("client-1", "client-3")] * 2
    assert outcome.states("client-2") == ["declined"]
    assert "cut 2 was asked for; this site takes part from 3 on" in outcome.reasons("client-2")
    said = [(record.name, record.getMessage()) for record in caplog.records]
    for side in ("splitft.deploy.site.session", "splitft.deploy.server.liveness"):
        assert any(name == side and "client-2 declines" in line for name, line in said)


@pytest.mark.hostile("a base model that is not the server's", "it is never loaded; the site declines")
def test_a_base_model_that_is_not_the_servers_is_never_loaded(tiny_llama, text):
    prepared = federation(tiny_llama, text, CUTS, training={"rounds": 1, "steps": 2})
    manifest = manifest_of(prepared.model)
    other = tuple(
        one._replace(sha256="0" * 64) if one.name.endswith(".safetensors") else one for one in manifest
    )
    policies = {
        name: SitePolicy(SiteSpec(), prepared.model, head=True) for name in ("client-1", "client-3")
    } | {"client-2": SitePolicy(site(model={"trusted": {}}), prepared.model, head=True)}
    outcome = deployed(prepared, policies=policies, manifest=manifest)
    assert outcome.states("client-2") == ["declined"]
    assert "model.safetensors" in outcome.reasons("client-2")
    assert outcome.participants() == [("client-1", "client-3")]
    wrong = deployed(
        federation(tiny_llama, text, CUTS, training={"rounds": 1, "steps": 2}),
        policies=policies,
        manifest=other,
    )
    assert wrong.error is not None
    assert "is not the server's" in wrong.reasons("client-1")


@pytest.mark.hostile(
    "a tensor that is not the server's", "it is never loaded; sites that do not need it go on"
)
def test_a_site_declines_over_a_tensor_that_it_needs_and_no_other(tiny_llama, text):
    prepared = federation(tiny_llama, text, CUTS, training={"rounds": 1, "steps": 2})
    names = [client.name for client in prepared.clients]
    policies = {name: SitePolicy(SiteSpec(), prepared.model, head=True) for name in names}
    tensors = tuple(
        one._replace(sha256="0" * 64) if one.name == "model.layers.2.mlp.up_proj.weight" else one
        for one in tensors_of(prepared.model)
    )
    outcome = deployed(prepared, policies=policies, manifest=manifest_of(prepared.model), tensors=tensors)
    assert outcome.error is None
    assert outcome.states("client-3") == ["declined"]  # the others' cuts are 1 and 2
    assert "tensor model.layers.2.mlp.up_proj.weight" in outcome.reasons("client-3")
    assert outcome.participants() == [("client-1", "client-2")]
