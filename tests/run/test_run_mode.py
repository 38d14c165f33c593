"""A choice for the whole run: how the server's factors step, where it is written, and resuming with it."""

from __future__ import annotations

import pytest

import splitft
from laws.federations import write_text
from splitft.config import dump, from_mapping, load
from splitft.deploy.run_terms import load_run_terms
from splitft.errors import ConfigError, DeployError
from splitft.run import run_mode
from splitft.run.plan import fleet_for
from splitft.run.run_mode import settle, ways_of
from splitft.specs.server_stepping import SERVER_STEPPING, ServerStepping
from splitft.tracking.events import CutsChanged, WireChosen
from splitft.tracking.log import read_events

FAR = {"up_mbit_per_s": 5.0, "down_mbit_per_s": 5.0, "latency_ms": 500.0}


@pytest.fixture
def configured(tiny_llama, tmp_path):
    def make(**sections):
        given = {
            "model": {"name": str(tiny_llama), "dtype": "float32"},
            "data": {"source": str(write_text(tmp_path / "notes.jsonl")), "max_tokens": 32},
            "clients": {"count": 2, "cuts": "auto"},
            "split": {"server_adapters": "auto"},
            "training": {"rounds": 2, "steps": 2, "batch_size": 2},
            "schedule": {"controller": "quickest", "devices": ["phone", "laptop"], "links": "lan"},
        }
        return from_mapping(
            {key: {**given.get(key, {}), **one} for key, one in {**given, **sections}.items()}
        )

    return make


def test_a_way_that_is_given_stays(configured):
    config = configured(split={"server_adapters": "shared"})
    settled, fleet, reason = settle(config, fleet_for(config))
    assert (settled, reason) == (config, "")
    assert fleet.costs.server.adapters == "shared"


def test_ways_that_tie_settle_on_one_copy_for_each_client(configured):
    config = configured()
    settled, fleet, reason = settle(config, fleet_for(config))
    assert settled.split.server_adapters == fleet.costs.server.adapters == "per-client"
    assert reason == "the server's factors step per-client"


def test_only_ways_that_fit_the_rest_are_compared(configured):
    assert ways_of(configured()) == list(SERVER_STEPPING)
    assert ways_of(configured(aggregate={"rule": "fedsa"})) == ["per-client"]
    in_parts = configured(training={"micro_batches": 2})
    assert "shared-in-turn" not in ways_of(in_parts)


@pytest.fixture
def turns_win(monkeypatch):
    better = {**SERVER_STEPPING, "shared-in-turn": ServerStepping(100.0, "a test")}
    monkeypatch.setattr("splitft.schedule.design_space.SERVER_STEPPING", better)
    return monkeypatch


def test_the_chosen_way_is_written_to_the_folder_and_resumed_with(configured, turns_win, tmp_path):
    config = configured()
    whole = splitft.train(config, tmp_path / "whole")
    assert load(tmp_path / "whole" / "config.yaml").split.server_adapters == "shared-in-turn"
    first = next(e for e in read_events(tmp_path / "whole" / "events.jsonl") if isinstance(e, CutsChanged))
    assert "the server's factors step shared-in-turn" in first.reason
    # stopped after a round; meanwhile a measurement has changed which way is the best
    one_round = config.model_copy(update={"training": config.training.model_copy(update={"rounds": 1})})
    splitft.train(one_round, tmp_path / "stopped")
    turns_win.undo()
    resumed = splitft.train(config, tmp_path / "stopped", resume=True)
    assert load(tmp_path / "stopped" / "config.yaml").split.server_adapters == "shared-in-turn"
    assert resumed.summary["eval_loss"] == whole.summary["eval_loss"]


def test_a_described_fleet_that_began_with_makespan_goes_on_with_it(configured, tmp_path):
    before = configured(split={"server_adapters": "per-client"}, schedule={"controller": "makespan"},
                        training={"rounds": 1})  # fmt: skip
    splitft.train(before, tmp_path / "run")
    config = run_mode.as_begun(configured(), tmp_path / "run", resume=True)
    assert (config.schedule.controller, config.split.server_adapters) == ("makespan", "per-client")
    splitft.train(configured(), tmp_path / "run", resume=True)


def test_a_deployed_run_whose_sites_know_no_fleet_has_one_copy_for_each_client(configured, turns_win):
    assert load_run_terms(configured()).config.split.server_adapters == "per-client"


def test_auto_reads_back_as_it_is_and_misspelt_ways_are_refused(configured, tmp_path):
    (tmp_path / "run.yaml").write_text(dump(configured()), encoding="utf-8")
    assert load(tmp_path / "run.yaml").split.server_adapters == "auto"
    with pytest.raises(ConfigError, match="server_adapters"):
        configured(split={"server_adapters": "automatic"})


def test_codecs_are_measured_on_split_clients_and_then_the_whole_model_is_an_option_too(configured, tmp_path):
    """A far client is measured at a split cut before it is left the whole model in round 1."""
    config = configured(wire={"hidden": "auto", "gradient": "auto"}, schedule={
        "controller": "quickest", "devices": ["workstation", "phone"], "links": [FAR, "lan"],
    })  # fmt: skip
    splitft.train(config, tmp_path / "run")
    events = list(read_events(tmp_path / "run" / "events.jsonl"))
    assert {event.client for event in events if isinstance(event, WireChosen)} == {"client-1", "client-2"}
    first = next(event for event in events if isinstance(event, CutsChanged))
    assert first.cuts["client-1"] == 4
    assert "client-1" in first.reason or "every client trains the whole model" in first.reason


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"training": {"steps_by": "time", "schedule": "cosine"}}, "training.schedule cosine"),
        ({"training": {"steps_by": "time"}, "split": {"server_adapters": "shared"}}, "adapters shared"),
        ({"training": {"steps_by": "time"}, "privacy": {"hidden": {"defence": "clip"}}}, "privacy"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)  # fmt: skip
def test_steps_by_time_are_refused_where_clients_need_equal_numbers(configured, section, said):
    with pytest.raises(ConfigError, match="clients need equal numbers of steps") as caught:
        configured(**section)
    assert said in str(caught.value)


def test_steps_by_time_cannot_be_deployed_and_the_ways_it_leaves_are_per_client(configured):
    config = configured(training={"steps_by": "time"})
    assert ways_of(config) == ["per-client"]
    with pytest.raises(DeployError, match=r"training\.steps_by: time goes by the simulated clock"):
        load_run_terms(config)
