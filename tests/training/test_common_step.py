"""On shared factors, the step of a client that is lost in the middle leaves nothing, and the others go on."""

from __future__ import annotations

import pytest
import torch

from laws.federations import federation, largest_relative_difference, write_text
from splitft.protocol import RoundStart

PARTS = {"rounds": 1, "steps": 2, "batch_size": 4, "micro_batches": 2}
CUTS = [1, 2, 3]


@pytest.fixture
def begun(tiny_llama, tmp_path):
    """The server and the clients of a round that has begun."""
    text = write_text(tmp_path / "notes.jsonl")

    def begin(mode="shared", names=("client-1", "client-2", "client-3"), **training):
        split = {"server_adapters": mode}
        prepared = federation(tiny_llama, text, CUTS, training={**PARTS, **training}, split=split)
        state, clients = prepared.initial(), {one.name: one for one in prepared.clients}
        prepared.server.place(state.cuts)
        prepared.server.start(1, names, state.adapters)
        for name in names:
            clients[name].start(RoundStart(round=1, cut=state.cuts[name]))
        return prepared.server, {name: clients[name] for name in names}

    return begin


def part(server, client):
    """One micro-batch of a client, there and back."""
    [group] = server.groups([client.forward()])
    reply = server.forward(group)[client.name]
    client.backward(server.backward([client.head(reply)])[client.name])


def step(server, *clients):
    for client in clients:
        part(server, client)
        part(server, client)


def learnt(server, name="client-1"):
    return server.trained(name)[0].tensors()


@pytest.mark.parametrize("how", ["leave", "rest"])
def test_a_client_that_is_lost_between_two_parts_leaves_nothing_behind(begun, how):
    server, clients = begun()
    one, lost, three = clients.values()
    part(server, lost)
    step(server, one, three)
    before = learnt(server)
    getattr(server, how)(lost.name)  # the common step of the others is complete with that
    assert largest_relative_difference(learnt(server), before) > 1e-3
    step(server, one, three)
    without, others = begun(names=("client-1", "client-3"))
    step(without, *others.values())
    step(without, *others.values())
    assert largest_relative_difference(learnt(server), learnt(without)) < 1e-9


def test_a_completed_step_of_a_client_that_leaves_counts(begun):
    server, clients = begun()
    one, lost, three = clients.values()
    step(server, one, lost)
    server.leave(lost.name)
    step(server, three)
    whole, others = begun()
    step(whole, *others.values())
    assert largest_relative_difference(learnt(server), learnt(whole)) < 1e-9


def test_who_has_completed_its_step_waits_for_the_others(begun):
    server, clients = begun()
    one, two, three = clients.values()
    before = {name: tensor.clone() for name, tensor in learnt(server).items()}
    step(server, one, two)
    common = server.blocks.common
    assert (common.finished, common.awaited) == ({"client-1", "client-2"}, {"client-3"})
    assert all(torch.equal(tensor, before[name]) for name, tensor in learnt(server).items())
    step(server, three)
    assert (common.finished, common.number) == (set(), 1)


@pytest.mark.parametrize("mode", ["shared-in-turn", "shared-by-arrival"])
def test_a_step_given_up_in_the_middle_leaves_nothing_on_shared_factors(begun, mode):
    server, clients = begun(mode, micro_batches=1)
    one, two, _ = clients.values()
    server.forward([two.forward()])
    server.forget(two.name)
    part(server, one)
    alone, others = begun(mode, names=("client-1",), micro_batches=1)
    part(alone, others["client-1"])
    assert largest_relative_difference(learnt(server), learnt(alone)) < 1e-9


def test_a_step_that_is_forgotten_and_taken_again_counts_once(begun):
    server, clients = begun()
    one, two, three = clients.values()
    part(server, two)
    server.forget(two.name)
    two.start(RoundStart(round=1, cut=two.plan.cut))
    step(server, one, two, three)
    once, others = begun()
    step(once, *others.values())
    assert largest_relative_difference(learnt(server), learnt(once)) < 1e-9
