"""Server factors that step by arrival train what delayed gradients train on a whole model, in that order."""

from __future__ import annotations

import pytest
import torch

import splitft
from laws import methods_oracle as oracle
from laws.federations import federation, largest_relative_difference, play, write_text
from laws.test_methods import Played, _assert_equal
from runs import StoppedError, adapter_bytes, settings, stop_at
from splitft.config import from_mapping
from splitft.errors import ConfigError
from splitft.protocol import RoundStart
from splitft.schedule.arrival_order import StepMark, waves
from splitft.seeds import Draw
from splitft.tracking.events import StepDone

CUTS, ROUNDS, STEPS, LR = (1, 3, 2), 2, 6, 5e-3


def _machine(speed):
    return {
        "block_forward_ms_per_token": 0.05 / speed,
        "block_backward_ms_per_token": 0.1 / speed,
        "head_ms_per_token": 0.02 / speed,
        "memory_gb": 8,
    }


FLEET = {
    "server": _machine(2),
    "devices": [_machine(speed) for speed in (1, 0.1, 3)],
    "links": [{"up_mbit_per_s": 100, "down_mbit_per_s": 100, "latency_ms": ms} for ms in (10, 40, 3)],
}
"""So unequal that quick clients step several times while a slow one's gradient is underway."""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


@pytest.fixture
def sections(tiny_llama, text):
    def make(**changes):
        base = {
            "model": {"name": str(tiny_llama), "dtype": "float64"},
            "data": {"source": str(text), "max_tokens": 32},
            "clients": {"count": 3, "cuts": list(CUTS), "shares": {"by": "length", "alpha": 1.0}},
            "lora": {"rank": 4, "alpha": 8, "rank_at_cut": None},
            "training": {"rounds": ROUNDS, "steps": STEPS, "batch_size": 3, "lr": LR},
            "aggregate": {"rule": "factors", "norm_bound": None},
            "split": {"server_adapters": "shared-by-arrival"},
            "schedule": FLEET,
            "wire": {"hidden": "fp64", "gradient": "fp64", "adapter": "fp64"},
        }
        for name, values in changes.items():
            base[name] = {**base.get(name, {}), **values}
        return base

    return make


@pytest.fixture
def played(sections, tiny_llama):
    return lambda **changes: Played(from_mapping(sections(**changes)), tiny_llama)


def _marks(run, number):
    """The clock's order of a round."""
    steps = run.prepared.config.training.steps
    return run.prepared.cut_schedule.arrival_order(number, run.state.cuts, steps)


def _orders(run):
    """The same of each round, as the oracle takes it."""
    names = [client.name for client in run.prepared.clients]
    rounds = range(1, run.prepared.config.training.rounds + 1)
    return [
        [(names.index(mark.client), mark.event == "begins") for mark in _marks(run, number)]
        for number in rounds
    ]


def _overlaps(order):
    """Steps of others that complete between a step's beginning and its completion, at most."""
    most, underway = 0, {}
    for client, begins in order:
        if begins:
            underway[client] = 0
            continue
        most = max(most, underway.pop(client))
        underway = {other: count + 1 for other, count in underway.items()}
    return most


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"split": {"labels": "server"}},
        {"training": {"micro_batches": 3}},
        {"split": {"group_tokens": 1}},
        {"training": {"checkpoint_blocks": True}},
        {"schedule": {"changes": [{"round": 2, "client": 1, "compute": 0.02}]}},
    ],
    ids=["client's labels", "server's labels", "micro-batches", "singly", "checkpointed", "changing clock"],
)
def test_the_trajectory_is_that_of_delayed_gradients_in_the_clocks_order(played, changes):
    run = played(**changes)
    orders = _orders(run)
    if "labels" not in changes.get("split", {}):
        assert max(map(_overlaps, orders)) > 1
    assert (orders[0] != orders[1]) == ("schedule" in changes)
    _assert_equal(run.learnt(), oracle.by_arrival(run.whole, run.start, run.batches, LR, CUTS, orders))


def test_grouping_changes_the_result_by_rounding_only(played):
    alike = {"server": _machine(0.1), "devices": _machine(1), "links": FLEET["links"][0]}
    grouped, singly = (played(split={"group_tokens": most}, schedule=alike) for most in (4096, 1))
    # batches wait for the slow server, and steps complete in a row
    assert any(len(clients) == 3 for event, clients in waves(_marks(grouped, 1)) if event == "completes")
    order = singly.prepared.cut_schedule.arrival_order
    again = federation_of(grouped.prepared.config, order)
    assert largest_relative_difference(again.tensors(), singly.state.adapters.tensors()) < 1e-6


def federation_of(config, order):
    """The adapters of a run with the order of another's clock."""
    from splitft.run.setup import prepare

    prepared = prepare(config)

    def ordered(simulation):
        simulation._order = order
        return simulation

    return play(prepared, around=ordered)[0].adapters


def test_with_one_client_it_is_per_client_training(tiny_llama, text):
    shared, own = (
        play(
            federation(
                tiny_llama,
                text,
                [2],
                split={"server_adapters": mode},
                training={"rounds": 2, "steps": 4, "optimizer_state": "keep", "schedule": "linear"},
            )
        )[0]
        for mode in ("shared-by-arrival", "per-client")
    )
    assert largest_relative_difference(shared.adapters.tensors(), own.adapters.tensors()) == 0


@pytest.mark.parametrize("rate", ["constant", "linear"])
def test_where_no_steps_overlap_it_is_shared_in_turn_in_that_order(sections, rate):
    training = {"schedule": rate}
    config = from_mapping(sections(training=training))
    seed = config.seed

    def in_drawn_order(number, cuts, steps):
        names = list(cuts)
        return [
            StepMark(names[place], event)
            for step in range(steps)
            for place in Draw.TURN.generator(seed, number, step).permutation(len(names))
            for event in ("begins", "completes")
        ]

    ours = federation_of(config, in_drawn_order)
    in_turn = from_mapping(sections(split={"server_adapters": "shared-in-turn"}, training=training))
    theirs = federation_of(in_turn, None)
    assert largest_relative_difference(ours.tensors(), theirs.tensors()) == 0


def test_a_client_forgotten_in_its_step_leaves_the_shared_factors_as_they_were(tiny_llama, text):
    prepared = federation(tiny_llama, text, [1, 2], split={"server_adapters": "shared-by-arrival"})
    server, state = prepared.server, prepared.initial()
    server.place(state.cuts)
    server.start(1, list(state.cuts), state.adapters)
    before = server.trained("client-1")[0].tensors()
    one, _ = prepared.clients
    for client in prepared.clients:
        client.start(RoundStart(round=1, cut=client.plan.cut))
    replies = server.forward([client.forward() for client in prepared.clients])
    server.leave("client-2")
    assert _unequal(server, before) == set()
    server.backward([one.head(replies["client-1"])])
    assert {name.rpartition(".")[2] for name in _unequal(server, before)} == {
        "B"
    }  # A has no gradient at B = 0
    server.finish()
    slots = {slot for layer in server.blocks.bank._layers.values() for slot in layer.slots}
    assert slots == set()


def test_a_step_begun_again_sees_the_factors_of_its_new_beginning(tiny_llama, text):
    def hidden(begun_before):
        prepared = federation(tiny_llama, text, [1, 2], split={"server_adapters": "shared-by-arrival"})
        server, state = prepared.server, prepared.initial()
        server.place(state.cuts)
        server.start(1, list(state.cuts), state.adapters)
        one, other = prepared.clients
        for client in prepared.clients:
            client.start(RoundStart(round=1, cut=client.plan.cut))
        batch = other.forward()
        if begun_before:
            server.forward([batch])
            server.forget("client-2")
        server.backward([one.head(server.forward([one.forward()])["client-1"])])
        return server.forward([batch])["client-2"].hidden

    assert torch.equal(hidden(True), hidden(False))


def _unequal(server, before):
    after = server.trained("client-1")[0].tensors()
    return {name for name in before if not torch.equal(after[name], before[name])}


@pytest.mark.parametrize("labels", ["client", "server"])
def test_it_resumes_bit_for_bit_with_moments_and_moving_cuts(tmp_path, tiny_llama, text, labels):
    config = from_mapping(
        settings(
            tiny_llama,
            text,
            clients={"cuts": [1, 2, 2]},
            split={"server_adapters": "shared-by-arrival", "labels": labels},
            training={"rounds": 4, "optimizer_state": "keep", "micro_batches": 2},
            aggregate={"rule": "zero-pad"},
            schedule={
                "controller": "resources",
                "changes": [
                    {"round": 2, "client": 1, "compute": 0.1, "link": 0.05},
                    {"round": 2, "client": 2, "compute": 20},
                ],
            },
        )
    )
    whole = splitft.train(config, tmp_path / "whole")
    assert any(len(set(client["cut"])) > 1 for client in whole.summary["clients"])
    with pytest.raises(StoppedError):
        splitft.train(config, tmp_path / "stopped", listeners=[stop_at(StepDone, round=3, count=4)])
    again = splitft.train(config, tmp_path / "stopped", resume=True)
    assert adapter_bytes(again.folder) == adapter_bytes(whole.folder)


def test_the_servers_learning_rate_is_that_of_the_step_whose_gradient_came(played):
    run = played(training={"schedule": "linear"})
    wanted = oracle.by_arrival(
        run.whole, run.start, run.batches, LR, CUTS, _orders(run), lambda step: 1 - step / (ROUNDS * STEPS)
    )
    _assert_equal(run.learnt(), wanted)


def test_what_bounds_each_clients_update_does_not_fit_factors_that_all_train(sections):
    with pytest.raises(ConfigError, match=r"privacy.updates.clip_norm"):
        from_mapping(sections(privacy={"updates": {"clip_norm": 1.0}}))
