"""A method sets what defines it, says what contradicts it, and gives way to nothing but its own name."""

from __future__ import annotations

import pytest
import yaml

from splitft.config import dump, from_mapping, load
from splitft.errors import ConfigError
from splitft.methods import METHODS, Fixed, Method


def refused(**given):
    with pytest.raises(ConfigError) as caught:
        from_mapping(given)
    return str(caught.value)


def test_every_method_has_a_source_and_a_difference():
    for method in METHODS.values():
        assert method.source
        assert method.difference.endswith(".")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_configuration_that_reads_back_as_it_is(tmp_path, name):
    config = from_mapping({"method": name})
    file = tmp_path / "run.yaml"
    file.write_text(dump(config), encoding="utf-8")
    assert load(file) == config
    assert config.method == name


@pytest.mark.parametrize("name", METHODS)
def test_any_method_can_be_asked_for_over_a_file_that_says_otherwise(tmp_path, name):
    file = tmp_path / "run.yaml"
    given = {
        "clients": {"count": 3, "cuts": [4, 2, 3]}, "split": {"server_adapters": "per-client"},
        "schedule": {"controller": "fixed"}, "training": {"participation": 1.0},
        "aggregate": {"rule": "svd"}, "lora": {"rank_at_cut": 4},
    }  # fmt: skip
    file.write_text(yaml.safe_dump(given), encoding="utf-8")
    config = load(file, [f"method={name}"])
    wanted = {"splitft": (4, 2, 3)} | dict.fromkeys(
        ("centralized", "local", "fedlora", "flexlora", "hlora"), "whole"
    )
    assert (config.lora.rank_at_cut == 4) == name.startswith("splitft")  # which is what SplitFT brought
    assert config.clients.cuts == wanted.get(name, 2)  # one cut for all: the shallowest that was given


def test_an_override_that_contradicts_the_method_is_still_refused(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("clients: {cuts: 3}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"clients.cuts=5: clients.cuts: found 5, but method fedlora keeps"):
        load(file, ["method=fedlora", "clients.cuts=5"])


def test_split_with_participation_below_1_says_why_and_what_would_fit():
    said = refused(method="split", training={"participation": 0.5})
    assert (
        "training.participation: found 0.5, but method split hands its one model through all clients" in said
    )
    assert "give 1 or leave it out, or choose" in said


def test_fedlora_with_cuts_says_why_and_what_would_fit():
    said = refused(method="fedlora", clients={"cuts": 3})
    assert said.startswith("clients.cuts: found 3, but method fedlora keeps the whole model on every client")
    assert "give whole or leave it out, or choose splitft" in said


def test_a_method_that_does_not_exist_is_refused_with_the_nearest_name():
    assert "did you mean fedlora?" in refused(method="fedlor")
    assert refused(method=["fedlora"]).startswith('method: found ["fedlora"]; give centralized | local')


def test_a_method_of_a_plug_in_fixes_keys_like_a_built_in_one(monkeypatch):
    monkeypatch.setattr(METHODS, "_things", dict(METHODS._things))
    mine = Method("A paper.", "One step a round.", {"training.steps": Fixed(1, "takes one step a round")})
    METHODS.add("one-step", mine)
    assert from_mapping({"method": "one-step"}).training.steps == 1
    said = refused(method="one-step", training={"steps": 3})
    assert said.startswith("training.steps: found 3, but method one-step takes one step a round; give 1")


def test_methods_with_one_cut_refuse_several():
    said = refused(method="splitlora", clients={"count": 2, "cuts": [2, 3]})
    assert "found [2, 3], but method splitlora has one cut for all clients; give one number" in said


def test_splitft_lets_cuts_choose_themselves_where_a_fleet_is_described_and_cuts_are_not():
    fleet = {"devices": "phone"}
    assert from_mapping({"schedule": fleet}).clients.cuts == "auto"
    assert from_mapping({"schedule": fleet}).schedule.controller == "quickest"
    assert from_mapping({"schedule": fleet}).split.server_adapters == "auto"
    given = {"split": {"server_adapters": "shared-in-turn"}}
    assert from_mapping({"schedule": fleet, **given}).split.server_adapters == "shared-in-turn"
    by_name = from_mapping({"schedule": {**fleet, "controller": "makespan"}, "clients": {"cuts": "auto"}})
    assert (by_name.schedule.controller, by_name.split.server_adapters) == ("makespan", "per-client")
    assert from_mapping({"schedule": fleet, "clients": {"cuts": 3}}).clients.cuts == 3
    assert from_mapping({"schedule": {**fleet, "controller": "fixed"}}).clients.cuts == 2
    assert from_mapping({"schedule": fleet, "method": "splitft-fixed"}).clients.cuts == 2
    assert from_mapping({}).clients.cuts == 2


OPTIONS = {
    "lora": {"rank": 8, "dropout": 0.1, "lr_ratio": 4, "scaling": "rslora"},
    "training": {"lr": 3e-3, "clip": 1.0, "warmup": 2, "schedule": "cosine", "weight_decay": 0.1},
    "wire": {"hidden": "int8", "gradient": "int8", "adapter": "bf16"},
    "data": {"max_tokens": 64},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_the_options_that_are_given_and_new_optimizers_each_round_if_it_averages(name):
    config = from_mapping({"method": name, **OPTIONS})
    for section, options in OPTIONS.items():
        for key, value in options.items():
            assert getattr(getattr(config, section), key) == value
    averages = config.aggregate.federated and config.training.order == "together"
    assert (config.training.optimizer_state == "reset") == averages
    plain = from_mapping({"method": "splitft"}).model_dump(mode="json")
    changed = {
        f"{section}.{key}"
        for section, values in from_mapping({"method": name}).model_dump(mode="json").items()
        if isinstance(values, dict)
        for key, value in values.items()
        if plain[section][key] != value
    }
    assert changed <= METHODS[name].fixes.keys() | METHODS[name].defaults.keys()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"clients": {"cuts": "whole"}, "split": {"labels": "server"}}, "split.labels: found server, but"),
        ({"clients": {"pooled": True}}, "clients.pooled: found true, which is for whole models"),
        ({"aggregate": {"federated": False}}, "aggregate.federated: found false, which is for whole models"),
        ({"training": {"order": "in-turn"}}, "training.order: found in-turn, which hands one model on"),
        ({"lora": {"client_ranks": [4, 2]}}, "lora.client_ranks: found 2 ranks for 4 clients"),
        ({"lora": {"client_ranks": [32, 2, 2, 2]}}, "client_ranks 32 is above rank 16"),
    ],
)  # fmt: skip
def test_keys_that_methods_set_say_what_they_need(given, said):
    assert said in refused(**given)
