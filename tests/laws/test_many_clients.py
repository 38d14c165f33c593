"""Who else is in the server's batch changes nothing for a client."""

from __future__ import annotations

import pytest
import torch

from laws.federations import federation, largest_relative_difference, play, write_text
from splitft.errors import ProtocolError
from splitft.protocol import Activations


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl", examples=60)


EXACT32 = {"model": {"dtype": "float32"}, "wire": dict.fromkeys(("hidden", "gradient", "adapter"), "fp32")}


@pytest.fixture
def one_step(tiny_llama, text):
    """First step of four clients with four batches, together or one after the other."""

    def step(together: bool):
        sections = {**EXACT32, "model": {"name": str(tiny_llama), "dtype": "float32"}}
        sections["training"] = {"optimizer": "sgd", "lr": 0.1}  # Adam's first step is a sign: 1e-9 becomes lr
        prepared = federation(tiny_llama, text, [1, 2, 3, 2], **sections)
        server, clients = prepared.server, {client.name: client for client in prepared.clients}
        state = prepared.initial()
        server.place(state.cuts)
        server.start(1, list(clients), state.adapters)
        for client in prepared.clients:
            client.start(_start(client))
        sent = [client.forward() for client in prepared.clients]
        groups = [sent] if together else [[message] for message in sent]
        hidden, at_cut, after = {}, {}, {}
        for group in groups:
            replies = server.forward(group)
            gradients = [clients[name].head(reply) for name, reply in replies.items()]
            for name, reply in server.backward(gradients).items():
                hidden[name], at_cut[name] = replies[name].hidden, reply.gradient
                after.update({f"{name}/{k}": v for k, v in server.trained(name)[0].tensors().items()})
        return hidden, at_cut, after

    return step


def _start(client):
    from splitft.protocol import RoundStart

    return RoundStart(round=1, cut=client.plan.cut)


def test_each_client_gets_the_hidden_states_gradients_and_factors_it_would_get_alone(one_step):
    for together, alone in zip(one_step(True), one_step(False), strict=True):
        assert largest_relative_difference(together, alone) < 1e-5


def test_a_client_that_vanishes_between_forward_and_backward_leaves_the_others_as_they_were(tiny_llama, text):
    def trained(vanishing: bool):
        prepared = federation(tiny_llama, text, [1, 2, 3])
        server, state = prepared.server, prepared.initial()
        server.place(state.cuts)
        server.start(1, list(state.cuts), state.adapters)
        for client in prepared.clients:
            client.start(_start(client))
        members = prepared.clients if vanishing else prepared.clients[:2]
        replies = server.forward([client.forward() for client in members])
        gradients = [client.head(replies[client.name]) for client in prepared.clients[:2]]
        server.backward(gradients)
        return server

    with_third, without = trained(True), trained(False)
    for name in ("client-1", "client-2"):
        ours, alone = (server.trained(name)[0].tensors() for server in (with_third, without))
        assert largest_relative_difference(ours, alone) < 1e-9
    untouched, tokens = with_third.trained("client-3")
    assert tokens == 0
    assert all(not torch.count_nonzero(factors.B) for factors in untouched.values())


def test_a_gradient_without_its_batch_is_refused(tiny_llama, text):
    prepared = federation(tiny_llama, text, [1, 2, 3])
    server, state = prepared.server, prepared.initial()
    server.place(state.cuts)
    server.start(1, list(state.cuts), state.adapters)
    client = prepared.clients[0]
    client.start(_start(client))
    gradient = client.head(server.forward([client.forward()])[client.name])
    server.backward([gradient])
    with pytest.raises(ProtocolError, match="no batch of it is underway"):
        server.backward([gradient])


def test_grouping_changes_a_whole_run_by_rounding_only(tiny_llama, text):
    training = {"rounds": 2, "steps": 5}
    runs = [
        play(federation(tiny_llama, text, [1, 2, 3], training=training, split={"group_tokens": size}))[0]
        for size in (1, 10_000)
    ]
    assert largest_relative_difference(*(run.adapters.tensors() for run in runs)) < 1e-6


def test_shared_server_factors_take_one_step_on_the_loss_of_all_clients(tiny_llama, text):
    """Against autograd on one model whose loss is that of the concatenated batch."""
    training = {"rounds": 1, "steps": 1, "optimizer": "sgd", "lr": 0.1}
    prepared = federation(tiny_llama, text, [2, 2], training=training, split={"server_adapters": "shared"})
    start = prepared.initial().adapters
    state, _ = play(prepared)

    from splitft.adapters import attach
    from splitft.geometry import Span
    from splitft.model import loss_and_gradient

    segment = prepared.model.segment(Span(0, 4), embedding=True, head=True)
    bank = attach(segment.blocks, "attention", prepared.ranks.scale, torch.float64)
    bank.put("all", start)
    total = 0
    for client in federation(tiny_llama, text, [2, 2]).clients:
        batch = client.setup.stream.batch(0)
        with bank.routed([("all", len(batch.lengths))]):
            hidden = segment.run(batch.tokens)[batch.positions()]
        _, gradient = loss_and_gradient(segment, hidden, batch.targets())
        hidden.backward(gradient * batch.labelled_tokens)
        total += batch.labelled_tokens
    for (block, target, factor), parameter in bank.parameters("all").items():
        if block >= 2:
            wanted = parameter.detach() - 0.1 * parameter.grad / total
            found = getattr(state.adapters[block, target], factor)
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_clients_of_like_length_are_grouped_up_to_the_limit_and_unlike_ones_apart(tiny_llama, text):
    server = federation(tiny_llama, text, [1, 1], split={"group_tokens": 40}).server

    def batch(client, length):
        hidden = torch.zeros(length, 32)
        return Activations(
            client=client,
            round=1,
            step=0,
            training=True,
            lengths=(length,),
            labelled=((0, 1),),
            hidden=hidden,
        )

    sent = [batch("a", 10), batch("b", 11), batch("c", 12), batch("d", 13), batch("e", 36)]
    grouped = [[message.client for message in group] for group in server.groups(sent)]
    assert grouped == [["a", "b", "c"], ["d"], ["e"]]  # four of 13 are over 40; 13 and 36 are unlike
    assert [len(group) for group in server.groups([batch("a", 4), batch("b", 12)])] == [1, 1]
