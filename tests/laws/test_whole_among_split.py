"""Clients with the whole model train in one round with split clients: of them only adapters travel."""

from __future__ import annotations

import pytest

import splitft
from laws import methods_oracle as oracle
from laws.federations import largest_relative_difference, play, write_text
from laws.test_by_arrival import FLEET, _orders
from laws.test_methods import Played, _assert_equal
from runs import StoppedError, adapter_bytes, settings, stop_at
from splitft.adapters import with_folded
from splitft.config import from_mapping
from splitft.errors import GeometryError
from splitft.run.setup import prepare
from splitft.specs.rules import RULES
from splitft.tracking.events import RoundTimed, RunStarted, StepDone
from splitft.tracking.log import read_events

CUTS, LR = (2, 4, 1), 5e-3
"""Of four blocks."""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


@pytest.fixture
def configured(tiny_llama, text):
    def make(**sections):
        base = {
            "model": {"dtype": "float64"},
            "data": {"max_tokens": 32},
            "clients": {"cuts": list(CUTS)},
            "lora": {"rank_at_cut": None},
            "training": {"rounds": 2, "steps": 3, "batch_size": 3, "lr": LR},
            "aggregate": {"rule": "factors"},
            "wire": {"hidden": "fp64", "gradient": "fp64", "adapter": "fp64"},
        }
        for name, values in sections.items():
            base[name] = {**base.get(name, {}), **values}
        return from_mapping(settings(tiny_llama, text, **base))

    return make


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_aggregates_them_as_clients_that_are_split(rule, configured):
    def products(cuts):
        prepared = prepare(configured(clients={"cuts": cuts}, aggregate={"rule": rule}))
        state, _ = play(prepared)
        if prepared.ranks.keeps_own:  # nobody trains a common B
            return {str(key): one.A for key, one in state.adapters.items()}
        return {str(key): one.product() for key, one in with_folded(state.adapters, state.folded).items()}

    assert largest_relative_difference(products(list(CUTS)), products([2, 3, 1])) < 1e-5


def test_shared_server_factors_step_by_arrival_without_them(configured, tiny_llama):
    run = Played(configured(split={"server_adapters": "shared-by-arrival"}, schedule=FLEET), tiny_llama)
    orders = _orders(run)
    assert {client for order in orders for client, _ in order} == {0, 2}
    _assert_equal(run.learnt(), oracle.by_arrival(run.whole, run.start, run.batches, LR, CUTS, orders))


def test_shared_server_factors_step_in_turn_without_them(configured, tiny_llama):
    run = Played(configured(split={"server_adapters": "shared-in-turn"}), tiny_llama)
    names = [client.name for client in run.prepared.clients]
    done = [(event.round, names.index(event.client)) for event in run.events if isinstance(event, StepDone)]
    orders = [
        [(client, begins) for number, client in done if number == round_ and CUTS[client] < 4
         for begins in (True, False)]
        for round_ in (1, 2)
    ]  # fmt: skip
    _assert_equal(run.learnt(), oracle.by_arrival(run.whole, run.start, run.batches, LR, CUTS, orders))


def test_shared_server_factors_step_on_all_split_clients_together_without_them(configured):
    """Whatever the whole model's client does with its text, the shared factors of the others are the same."""

    def shared(lost):
        prepared = prepare(configured(split={"server_adapters": "shared"}))
        kept = [client for client in prepared.clients if client.name != lost]
        server, state = prepared.server, prepared.initial()
        simulation = prepared.simulation()
        server.place(state.cuts)
        names = [client.name for client in kept]
        server.start(1, names, state.adapters)
        from splitft.protocol import RoundStart

        simulation.start({one.name: RoundStart(round=1, cut=one.plan.cut) for one in kept})
        simulation.train(1, names, 3, lambda event: None)
        return server.trained("client-3")[0].tensors()

    with_whole, without = shared(""), shared("client-2")
    assert largest_relative_difference(with_whole, without) == 0


@pytest.mark.parametrize("way", ["per-client", "shared", "shared-in-turn", "shared-by-arrival"])
def test_a_mixed_run_resumes_bit_for_bit_and_says_what_the_server_receives(way, tmp_path, configured):
    config = configured(
        lora={"rank_at_cut": 2},
        aggregate={"rule": "zero-pad"},
        training={"optimizer_state": "keep"},
        split={"server_adapters": way},
        wire={"hidden": "int8", "gradient": "int8", "adapter": "int8"},
    )
    whole = splitft.train(config, tmp_path / "whole")
    with pytest.raises(StoppedError):
        splitft.train(config, tmp_path / "stopped", listeners=[stop_at(StepDone, round=2, count=2)])
    again = splitft.train(config, tmp_path / "stopped", resume=True)
    assert adapter_bytes(again.folder) == adapter_bytes(whole.folder)
    # only adapters of the client with the whole model travel, and it waits for nobody
    events = read_events(whole.folder / "events.jsonl")
    steps = [event for event in events if isinstance(event, StepDone)]
    sent = {name: {role for one in steps if one.client == name for role in one.traffic.up}
            for name in ("client-1", "client-2", "client-3")}  # fmt: skip
    assert sent == {"client-1": {"hidden", "gradient"}, "client-2": set(), "client-3": {"hidden", "gradient"}}
    for timed in (event for event in events if isinstance(event, RoundTimed)):
        legs = {"adapters_down", "client_forward", "head", "client_backward", "adapters_up"}
        assert timed.legs["client-2"].keys() == legs
    started = next(event for event in events if isinstance(event, RunStarted))
    assert started.received == "hidden"
    assert "send adapters alone: client-2." in started.privacy
    assert (whole.folder / "report.html").exists()


def test_where_every_client_is_given_all_blocks_only_adapters_are_received(tmp_path, configured):
    run = splitft.train(configured(clients={"cuts": [4, 4, 4]}), tmp_path / "run")
    assert "no hidden states" in run.summary["privacy"]


def test_their_codecs_are_chosen_as_the_others(configured):
    prepared = prepare(configured(wire={"hidden": "auto", "gradient": "auto"}))
    state, _ = play(prepared)
    assert state.round == 2


def test_labels_on_the_server_leave_it_at_least_a_block(configured):
    with pytest.raises(GeometryError, match=r"clients.cuts\[1\].*choose 1 to 3"):
        prepare(configured(split={"labels": "server"}))
