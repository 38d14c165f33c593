"""`splitft plan`: prices of every cut and each controller's choice, before anything is trained."""

from __future__ import annotations

import json
import os

import pytest
from typer.testing import CliRunner

import splitft
from laws.federations import write_text
from splitft.cli import app
from splitft.config import from_mapping, load
from splitft.errors import ConfigError
from splitft.registry import _changed
from splitft.report.share_charts import division_sentence
from splitft.run import inputs
from splitft.run.plan import plan
from splitft.specs.data import PARTITIONS, SOURCES
from splitft.specs.schedule import CONTROLLERS


@pytest.fixture
def settings(tiny_llama, tmp_path):
    return {
        "model": {"name": str(tiny_llama), "dtype": "float32"},
        "data": {"source": str(write_text(tmp_path / "notes.jsonl")), "max_tokens": 32},
        "clients": {"count": 3, "cuts": [1, 2, 3]},
        "schedule": {"devices": ["phone", "laptop", "workstation"], "links": ["lte", "dsl", "lan"]},
    }


def test_every_client_has_a_price_at_every_cut_that_leaves_the_server_a_block(settings):
    result = plan(from_mapping(settings))
    assert [client.name for client in result.clients] == ["client-1", "client-2", "client-3"]
    for client in result.clients:
        assert [price.cut for price in client.prices] == [1, 2, 3]
        memory = [price.memory_gb for price in client.prices]
        assert memory == sorted(memory)


def test_the_bytes_foretold_are_those_of_the_tensors_that_a_run_then_sends(settings, tmp_path):
    config = from_mapping({
        **settings,
        "training": {"rounds": 1, "steps": 12, "batch_size": 3},
        "clients": {"count": 1, "cuts": [2]},
        "lora": {"rank_at_cut": None},
        "schedule": {},
        "wire": {"in_process": "direct"},
    })  # fmt: skip
    foretold = plan(config).clients[0].prices[1]
    client = splitft.train(config, tmp_path / "run").summary["clients"][0]
    assert client["bytes_up"] / 1e6 == pytest.approx(foretold.up_mb, rel=0.02)
    assert client["bytes_down"] / 1e6 == pytest.approx(foretold.down_mb, rel=0.02)


def test_makespan_is_no_slower_than_the_others_by_its_own_prediction(settings):
    choices = {choice.controller: choice for choice in plan(from_mapping(settings)).choices}
    assert set(choices) == set(CONTROLLERS)
    assert list(choices["fixed"].cuts.values()) == [1, 2, 3]
    assert choices["makespan"].round_seconds <= choices["fixed"].round_seconds


def test_quickest_is_not_slower_than_any_method_in_the_plan_of_the_same_run(settings):
    result = plan(from_mapping(settings))
    chosen, *others = (one for one in result.alternatives if not one.method.startswith("training."))
    assert {one.method for one in others} == {
        "fedlora", "splitfed-v1", "splitfed-v2", "splitlora", "splitft-fixed", "makespan",
    }  # fmt: skip
    assert all(chosen.round_seconds <= one.round_seconds * (1 + 1e-9) for one in others)
    assert chosen.round_seconds == {c.controller: c for c in result.choices}["quickest"].round_seconds


def test_the_plan_says_who_is_not_split_and_what_other_methods_would_take(settings, tmp_path):
    far = {"up_mbit_per_s": 5.0, "down_mbit_per_s": 5.0, "latency_ms": 500.0}
    slow = {
        "block_forward_ms_per_token": 5.0, "block_backward_ms_per_token": 5.0,
        "head_ms_per_token": 0.1, "memory_gb": 4.0,
    }  # fmt: skip
    settings["clients"]["shares"] = {"by": "iid"}  # as much work for each
    settings["schedule"] = {"devices": ["workstation", slow, slow], "links": [far, "lan", "lan"]}
    del settings["clients"]["cuts"]
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings), encoding="utf-8")
    said = " ".join(CliRunner().invoke(app, ["plan", str(file)]).output.split())
    assert "quickest does not split client-1: the whole model trains there" in said
    assert "splitfed-v2" in said
    assert "times as long" in said
    said = " ".join(CliRunner().invoke(app, ["plan", str(file), "schedule.max_cut=3"]).output.split())
    assert "does not split" not in said


def test_the_plan_says_which_micro_batches_would_be_quicker(settings):
    slow = {
        "block_forward_ms_per_token": 5.0, "block_backward_ms_per_token": 5.0,
        "head_ms_per_token": 0.1, "memory_gb": 4.0,
    }  # fmt: skip
    server = {**slow, "block_forward_ms_per_token": 1.0, "block_backward_ms_per_token": 1.0}
    settings["schedule"] = {
        "devices": slow, "links": "lan", "server": server, "max_cut": 2, "controller": "quickest"
    }  # fmt: skip
    settings["training"] = {"batch_size": 4}
    settings["clients"] |= {"count": 1, "cuts": "auto"}
    chosen, parts, *_ = plan(from_mapping(settings)).alternatives
    assert parts.method.startswith("training.micro_batches=")
    assert parts.round_seconds < chosen.round_seconds
    given = dict(pair.split("=") for pair in parts.method.replace("training.", "").split())
    settings["training"] |= {name: int(value) for name, value in given.items()}
    assert plan(from_mapping(settings)).alternatives[0].round_seconds == pytest.approx(parts.round_seconds)


def test_a_method_that_needs_more_memory_than_there_is_says_so(settings):
    small = {
        "block_forward_ms_per_token": 5.0, "block_backward_ms_per_token": 5.0,
        "head_ms_per_token": 0.1, "memory_gb": 1e-6,
    }  # fmt: skip
    settings["schedule"] = {"devices": [small, "laptop", "laptop"], "misfit": "leave-out"}
    of = {one.method: one for one in plan(from_mapping(settings)).alternatives}
    assert set(of["chosen"].cuts) == {"client-2", "client-3"}


def test_a_client_that_fits_nowhere_is_named_with_what_it_lacks(settings):
    tiny = {
        "block_forward_ms_per_token": 1.0, "block_backward_ms_per_token": 1.0,
        "head_ms_per_token": 1.0, "memory_gb": 1e-6,
    }  # fmt: skip
    settings["schedule"] = {"devices": tiny}
    result = plan(from_mapping(settings))
    assert "lacks" in result.clients[0].lack
    assert not any(price.fits for price in result.clients[0].prices)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_prints_tables_or_json(as_json, settings, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings), encoding="utf-8")
    result = CliRunner().invoke(app, ["plan", str(file), *(["--json"] if as_json else [])])
    assert result.exit_code == 0, result.output
    if as_json:
        assert json.loads(result.output)["clients"][2]["prices"][0]["cut"] == 1
    else:
        assert "seconds a round" in result.output
        assert "makespan" in result.output


def test_asking_again_counts_nothing_anew_until_something_changes(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("SPLITFT_CACHE", str(tmp_path / "cache"))
    first = plan(from_mapping(settings))
    calls = []
    monkeypatch.setattr(
        inputs, "gather", lambda config, weights: calls.append(config) or pytest.fail("counted anew")
    )
    assert plan(from_mapping(settings)) == first
    changed = {**settings, "seed": 1}
    with pytest.raises(pytest.fail.Exception):
        plan(from_mapping(changed))
    assert len(calls) == 1


@pytest.fixture
def counting(tmp_path, monkeypatch):
    """Plans with a cache of their own; what is in the list was counted from the text."""
    monkeypatch.setenv("SPLITFT_CACHE", str(tmp_path / "cache"))
    calls, gather = [], inputs.gather
    monkeypatch.setattr(inputs, "gather", lambda config, weights: calls.append(config) or gather(config))
    return calls


def test_other_machines_links_cuts_and_steps_count_no_text_anew(settings, counting):
    plan(from_mapping(settings))
    others = {"schedule": {"devices": "laptop"}, "clients": {"count": 3, "cuts": 2}, "training": {"steps": 7}}
    for name, section in others.items():
        plan(from_mapping({**settings, name: section}))
    assert len(counting) == 1
    of_steps = [plan(from_mapping({**settings, "training": {"steps": n}})) for n in (10, 20)]
    shorter, longer = (one.choices[0].round_seconds for one in of_steps)
    assert longer > 1.5 * shorter


def test_what_was_counted_of_another_text_is_not_used(settings, counting, tmp_path):
    first = plan(from_mapping(settings))
    file = tmp_path / "notes.jsonl"
    before, text = file.stat(), file.read_text(encoding="utf-8")
    words = text.replace("fever", "a b c")  # as many bytes, written at the same time
    file.write_text(words, encoding="utf-8")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    second = plan(from_mapping(settings))
    assert len(counting) == 2
    file.write_text(text * 2, encoding="utf-8")
    plan(from_mapping(settings))
    assert len(counting) == 3
    file.write_text(text, encoding="utf-8")
    assert plan(from_mapping(settings)) == first
    assert len(counting) == 3
    assert second.blocks == first.blocks


def test_a_machine_that_is_measured_is_known_at_the_second_time(settings, counting, monkeypatch):
    settings["schedule"] = {"devices": "measured"}
    first = plan(from_mapping(settings))
    monkeypatch.setattr("splitft.model.open_model", lambda spec: pytest.fail("the model was opened again"))
    assert plan(from_mapping(settings)) == first


@pytest.fixture
def plugin_names():
    """Forget what the plug-in of a test has added."""
    yield
    for registry in (CONTROLLERS, PARTITIONS, SOURCES):
        registry._things.pop("mine", None)
    _changed()


PLUGIN = """
from splitft.data.partitions import PARTITIONS, Partition
from splitft.schedule.controllers import CONTROLLERS, Controller, Decision
from splitft.specs.data import SOURCES

def rows(spec, wanted):
    return [{"text": f"{spec.source_argument} {number} " * 9} for number in range(60)]

SOURCES.add("mine", rows)
PARTITIONS.add("mine", Partition(lambda examples, clients, spec, generator: [
    range(client, len(examples), clients) for client in range(clients)
], "in turn, column {column}"))
CONTROLLERS.add("mine", Controller(lambda problem: Decision({one.name: 2 for one in problem.clients}, "two")))
"""


def test_a_plug_in_adds_a_source_a_partition_and_a_controller(settings, tmp_path, plugin_names):
    (tmp_path / "mine.py").write_text(PLUGIN)
    settings |= {
        "plugins": ["mine.py"],
        "data": {"source": "mine:of a plug-in", "max_tokens": 16},
        "clients": {"count": 3, "cuts": "auto", "shares": {"by": "mine"}},
        "schedule": {"controller": "mine"},
        "training": {"rounds": 2, "steps": 1},
    }
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings))
    choices = {choice.controller: choice for choice in plan(load(file)).choices}
    assert set(choices["mine"].cuts.values()) == {2}
    assert choices["mine"].reason == "two"
    told = inputs.shares(load(file))
    assert told.summary.examples == (20, 20, 20)
    assert "in turn, column None" in division_sentence(told.to_json())
    run = splitft.train(file, tmp_path / "run")
    assert {cut for client in run.summary["clients"] for cut in client["cut"]} == {2}
    assert "mine" in (run.folder / "report.html").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match=r"found 'min'; give .*mine.*; did you mean mine"):
        load(file, ["schedule.controller=min"])
