"""Client and server speak in turn: what comes out of order, or does not fit the batch, is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from laws.federations import federation, write_text
from splitft.adapters import AdapterState
from splitft.errors import ProtocolError, RunError
from splitft.protocol import CutGradient, GlobalAdapters, HeadGradient, HeldOutLoss, LastHidden, RoundStart


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


@pytest.fixture
def parties(tiny_llama, text):
    """A server in round 1, client a in it and client b not; `labels` says where labels live."""

    def make(labels="client", **training):
        prepared = federation(tiny_llama, text, [1, 2], split={"labels": labels}, training=training)
        a, b = prepared.clients
        state = prepared.initial()
        prepared.server.place(state.cuts)
        prepared.server.install(state.adapters)
        prepared.server.start(1, [a.name], state.adapters)
        a.start(RoundStart(round=1, cut=1))
        return SimpleNamespace(server=prepared.server, a=a, b=b, state=state)

    return make


def _changed(message, **values):
    return type(message).model_validate({**dict(message), **values})


def test_the_usual_order_goes_through_and_counts_a_step(parties):
    p = parties()
    for step in range(2):
        hidden = p.server.forward([p.a.forward()])["client-1"]
        p.a.backward(p.server.backward([p.a.head(hidden)])["client-1"])
        assert p.a.steps == step + 1
    assert p.a.upload().adapters.keys() | p.server.trained("client-1")[0].keys() == p.state.adapters.keys()


# --- the client -----------------------------------------------------------------------------------


def test_a_client_takes_no_step_and_uploads_nothing_outside_a_round(parties):
    p = parties()
    for act in (p.b.forward, p.b.upload):
        with pytest.raises(ProtocolError, match="client-2: no round is underway; RoundStart is due first"):
            act()
    p.a.upload()
    with pytest.raises(ProtocolError, match="no round is underway"):
        p.a.upload()


def test_a_client_takes_no_reply_without_a_batch(parties):
    p = parties()
    row = torch.zeros(1, 32, dtype=torch.float64)
    for reply in (p.a.head, p.a.backward, p.a.held_out.head):
        with pytest.raises(ProtocolError, match="a reply came, but no batch is underway"):
            reply(LastHidden(step=0, hidden=row))


def test_a_client_takes_no_gradient_before_its_head_has_answered(parties):
    p = parties()
    sent = p.a.forward()
    gradient = CutGradient(step=0, gradient=torch.zeros_like(sent.hidden))
    with pytest.raises(ProtocolError, match="received CutGradient; expected LastHidden"):
        p.a.backward(gradient)
    p.a.head(p.server.forward([sent])["client-1"])
    p.a.backward(gradient)


def test_a_client_takes_no_reply_of_another_step_kind_or_size(parties):
    p = parties()
    sent = p.a.forward()
    hidden = p.server.forward([sent])["client-1"]
    with pytest.raises(ProtocolError, match="received LastHidden of step 9; expected 0"):
        p.a.head(_changed(hidden, step=9))
    with pytest.raises(ProtocolError, match="received CutGradient; expected LastHidden"):
        p.a.head(CutGradient(step=0, gradient=sent.hidden))
    with pytest.raises(ProtocolError, match=f"LastHidden has 1 rows, {sent.labelled_tokens} were due"):
        p.a.head(_changed(hidden, hidden=hidden.hidden[:1]))
    reply = p.server.backward([p.a.head(hidden)])["client-1"]
    with pytest.raises(ProtocolError, match="received LastHidden; expected CutGradient"):
        p.a.backward(hidden)
    with pytest.raises(ProtocolError, match=r"CutGradient \(1, 32\)"):
        p.a.backward(_changed(reply, gradient=reply.gradient[:1]))
    p.a.backward(reply)
    assert p.a.steps == 1


def test_a_client_takes_only_its_own_blocks(parties):
    p = parties()
    for blocks in ([], [0, 1]):
        with pytest.raises(ProtocolError, match="the global adapters are not those of"):
            p.a.install(GlobalAdapters(round=1, adapters=p.state.adapters.within(blocks)))
    with pytest.raises(ProtocolError, match="no factors came for block 1, which the new cut brings here"):
        p.a.start(RoundStart(round=2, cut=2))
    p.a.start(RoundStart(round=2, cut=2, adapters=p.state.adapters.within([1])))


def test_a_client_whose_labels_stay_at_home_is_told_no_loss(parties):
    p = parties()
    p.a.held_out.forward(0)
    with pytest.raises(ProtocolError, match="received HeldOutLoss; expected LastHidden"):
        p.a.held_out.head(HeldOutLoss(step=0, loss=1.0, tokens=3))


def test_a_loss_that_is_not_finite_stops_the_run_with_the_place(parties):
    p = parties()
    sent = p.a.forward()
    with pytest.raises(RunError, match=r"client-1: the loss is nan at step 0 of round 1; lower training\.lr"):
        p.a.head(LastHidden(step=0, hidden=torch.full((sent.labelled_tokens, 32), torch.nan).double()))


# --- the server -----------------------------------------------------------------------------------


def test_the_server_takes_batches_of_participants_of_this_round_only(parties):
    p = parties()
    sent = p.a.forward()
    for change, message in [
        ({"client": "eve"}, "eve is no client of this run"),
        ({"client": "client-2"}, "client-2 does not take part in this round"),
        ({"round": 2}, "received Activations of round 2; expected 1"),
    ]:
        with pytest.raises(ProtocolError, match=message):
            p.server.forward([_changed(sent, **change)])
    with pytest.raises(ProtocolError, match="two batches at once"):
        p.server.forward([sent, sent])
    with pytest.raises(ProtocolError, match="received Activations of training False; expected True"):
        p.server.forward([sent, p.b.held_out.forward(0)])
    p.server.forward([sent])
    with pytest.raises(ProtocolError, match="client-1 sends a batch, but its gradient was due"):
        p.server.forward([sent])


def test_the_server_takes_a_gradient_only_for_the_batch_underway(parties):
    p = parties()
    gradient = p.a.head(p.server.forward([p.a.forward()])["client-1"])
    for change, message in [
        ({"client": "client-2"}, "client-2 sends a gradient, but no batch of it is underway"),
        ({"step": 1}, "received HeadGradient of step 1; expected 0"),
        ({"round": 3}, "received HeadGradient of round 3; expected 1"),
        ({"gradient": gradient.gradient[:1]}, r"gradient \(1, 32\) does not fit"),
    ]:
        with pytest.raises(ProtocolError, match=message):
            p.server.backward([_changed(gradient, **change)])
    p.server.backward([gradient])
    with pytest.raises(ProtocolError, match="no batch of it is underway"):
        p.server.backward([gradient])


def test_evaluation_is_open_to_those_who_do_not_take_part(parties):
    p = parties()
    assert set(p.server.forward([p.a.held_out.forward(0), p.b.held_out.forward(0)])) == {
        "client-1",
        "client-2",
    }


def test_labels_that_the_server_needs_are_there_and_are_token_ids(parties):
    p = parties(labels="server")
    sent = p.a.forward()
    with pytest.raises(ProtocolError, match="client-1 sends no labels, but this run has them on the server"):
        p.server.forward([_changed(sent, labels=None)])
    for wrong in (-100, 272):
        labels = sent.labels.clone()
        labels[0] = wrong
        with pytest.raises(ProtocolError, match="labels that are not token ids below 272"):
            p.server.forward([_changed(sent, labels=labels)])
    p.a.backward(p.server.forward([sent])["client-1"])


def test_what_is_refused_changes_nothing(parties):
    """A step after refusals equals a step without them."""
    after = []
    for disturbed in (True, False):
        p = parties()
        sent = p.a.forward()
        if disturbed:
            for wrong in (_changed(sent, round=2), _changed(sent, client="eve")):
                with pytest.raises(ProtocolError):
                    p.server.forward([wrong])
        hidden = p.server.forward([sent])["client-1"]
        gradient = p.a.head(hidden)
        if disturbed:
            with pytest.raises(ProtocolError):
                p.server.backward([_changed(gradient, step=1)])
        p.a.backward(p.server.backward([gradient])["client-1"])
        state: AdapterState = p.a.upload().adapters.union(p.server.trained("client-1")[0])
        after.append(state.tensors())
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[1])


# --- steps in micro-batches -------------------------------------------------------------------------


def test_the_server_takes_only_parts_of_a_step_that_add_up_to_what_each_of_them_tells(parties):
    p = parties(micro_batches=3, in_flight=2)
    first, second = p.a.forward(), p.a.forward()
    assert (first.micro_batches, second.micro_batch) == (3, 1)
    p.server.forward([first])
    total = first.step_labelled
    for change, words in [
        ({"micro_batch": 0}, "its gradient was due"),
        ({"micro_batches": 4}, "a step in 4 parts; 3 were agreed"),
        ({"micro_batches": 2}, "micro_batches 2; expected 3"),
        ({"step": 1}, "step 1; expected 0"),
        ({"step_labelled": total + 1}, f"step_labelled {total + 1}; expected {total}"),
    ]:
        with pytest.raises(ProtocolError, match=words):
            p.server.forward([_changed(second, **change)])
    p.server.forward([second])
    third = p.a.forward()
    with pytest.raises(ProtocolError, match="its gradient was due"):  # two are in flight
        p.server.forward([third])
    with pytest.raises(ProtocolError, match="all of step 0 is underway"):
        p.a.forward()


def test_parts_that_have_other_labels_than_they_told_are_no_step(parties):
    p = parties(micro_batches=2, in_flight=2)
    first, second = (_changed(p.a.forward(), step_labelled=500) for _ in range(2))
    p.server.forward([first])
    with pytest.raises(ProtocolError, match="in 2 of 2 parts of a step that has 500"):
        p.server.forward([second])


def test_a_step_given_up_in_the_middle_leaves_nothing_behind(parties):
    """What its finished part had added to the gradients is gone, on the server too."""
    p = parties(micro_batches=3, in_flight=2, optimizer="sgd", lr=0.1)
    p.server.backward([p.a.head(p.server.forward([p.a.forward()])["client-1"])])
    before = p.server.trained("client-1")[0].tensors()
    p.server.forget("client-1")
    with pytest.raises(ProtocolError, match="no batch of it is underway"):
        p.server.backward(
            [HeadGradient(client="client-1", round=1, step=0, loss=0, gradient=torch.zeros(1, 32))]
        )
    parameters = p.server.blocks.bank.parameters("client-1").values()
    assert all(parameter.grad is None for parameter in parameters)
    after, tokens = p.server.trained("client-1")
    assert tokens == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in after.tensors().items())
