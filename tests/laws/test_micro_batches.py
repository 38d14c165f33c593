"""A step in micro-batches is the step on the whole batch, however many are underway and in whatever order."""

from __future__ import annotations

import random

import pytest
import torch

from laws.federations import federation, largest_relative_difference, play, write_text
from laws.test_split_equals_whole import _unsplit
from splitft.errors import ConfigError
from splitft.protocol import CutGradient, LastHidden, RoundStart

CUTS = [1, 2, 3]
SHORT = {"rounds": 2, "steps": 4, "batch_size": 5}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


@pytest.fixture(scope="module")
def learnt(tiny_llama, text):
    """What a run comes to: its factors, held-out losses and steps."""

    def run(split=None, clients=None, **training):
        sections = {"training": {**SHORT, **training}, "split": split or {}, "clients": clients or {}}
        prepared = federation(tiny_llama, text, CUTS, **sections)
        state, events = play(prepared)
        return state, [event for event in events if event.event == "StepDone"]

    return run


@pytest.mark.parametrize("split", [{}, {"labels": "server"}, {"server_adapters": "shared"}])
@pytest.mark.parametrize("micro_batches", [2, 3, 5])
def test_a_run_in_micro_batches_learns_what_the_undivided_run_does(learnt, split, micro_batches):
    (whole, steps), (parts, own) = (learnt(split=split, micro_batches=count) for count in (1, micro_batches))
    assert largest_relative_difference(parts.adapters.tensors(), whole.adapters.tensors()) < 1e-6
    assert parts.losses == pytest.approx(whole.losses, rel=1e-9)
    for one, other in zip(sorted(own, key=_place), sorted(steps, key=_place), strict=True):
        assert (one.tokens, one.examples, _place(one)) == (other.tokens, other.examples, _place(other))
        assert one.loss == pytest.approx(other.loss, rel=1e-6)


def _place(step):
    return step.client, step.step


def test_how_many_are_in_flight_is_nothing_to_the_result(learnt):
    one, all_at_once = (learnt(micro_batches=3, in_flight=count)[0] for count in (1, 3))
    for name, tensor in one.adapters.tensors().items():
        assert torch.equal(all_at_once.adapters.tensors()[name], tensor)


def test_whole_models_on_clients_and_one_after_the_other_may_divide_their_steps_too(learnt):
    for sections in (
        {"clients": {"cuts": "whole"}},
        {"clients": {"cuts": 2}, "order": "in-turn", "split": {"server_adapters": "shared"}},
    ):
        whole, parts = (learnt(micro_batches=count, **sections)[0] for count in (1, 3))
        assert largest_relative_difference(parts.adapters.tensors(), whole.adapters.tensors()) < 1e-6


@pytest.mark.parametrize("labels", ["client", "server"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("seed", "micro_batches"), [(0, 2), (1, 3), (2, 5)])
def test_parts_in_any_order_and_company_have_the_unsplit_models_loss_and_gradient(
    tiny_llama, text, cut, labels, seed, micro_batches
):
    training = {"batch_size": 5, "micro_batches": micro_batches, "in_flight": 5}
    prepared = federation(tiny_llama, text, [cut, 2], training=training, split={"labels": labels})
    clients, server = {one.name: one for one in prepared.clients}, prepared.server
    batches = {name: one.setup.stream.batch(0) for name, one in clients.items()}
    losses, gradients = _one_step(prepared, clients, server, random.Random(seed))
    for name, client in clients.items():
        loss, gradient = _unsplit(tiny_llama, batches[name], client.plan.cut, torch.float64)
        labelled = sum(tokens for _, tokens in losses[name].values())
        assert sum(one * tokens for one, tokens in losses[name].values()) / labelled == pytest.approx(loss)
        ours = torch.cat([gradients[name][number] for number in sorted(gradients[name])])
        assert (ours - gradient).abs().max() < 1e-6 * gradient.abs().max()  # norms compute in float32
        assert client.steps == 1
        assert server.trained(name)[1] == labelled


def _one_step(prepared, clients, server, drawn):
    """All parts of one step of all clients, in an order and in groups that are drawn."""
    state = prepared.initial()
    server.place(state.cuts)
    server.start(1, list(clients), state.adapters)
    for name, client in clients.items():
        client.start(RoundStart(round=1, cut=state.cuts[name]))
    losses, gradients = ({name: {} for name in clients} for _ in range(2))
    labelled, waiting, graded = {}, [], []
    for client in clients.values():
        waiting.append(client.forward())
        while client.unsent:
            waiting.append(client.forward())
    drawn.shuffle(waiting)

    def take(name, reply):
        if isinstance(reply, LastHidden):
            graded.append(clients[name].head(reply))
            losses[name][reply.micro_batch] = (graded[-1].loss, labelled[name, reply.micro_batch])
            return
        assert isinstance(reply, CutGradient)
        if reply.loss is not None:
            losses[name][reply.micro_batch] = (reply.loss, labelled[name, reply.micro_batch])
        gradients[name][reply.micro_batch] = reply.gradient
        clients[name].backward(reply)

    while waiting or graded:
        if waiting and (not graded or drawn.random() < 0.6):
            group = [waiting.pop()]
            if waiting and waiting[-1].client != group[0].client and drawn.random() < 0.5:
                group.append(waiting.pop())
            labelled.update({(one.client, one.micro_batch): one.labelled_tokens for one in group})
            for name, reply in server.forward(group).items():
                take(name, reply)
        else:
            gradient = graded.pop(drawn.randrange(len(graded)))
            for name, reply in server.backward([gradient]).items():
                take(name, reply)
    return losses, gradients


@pytest.mark.parametrize(
    ("training", "split", "words"),
    [
        ({"micro_batches": 4}, {}, "training.micro_batches"),
        ({"micro_batches": 2}, {"server_adapters": "shared-in-turn"}, "shared-in-turn the server steps"),
    ],
)
def test_what_cannot_be_divided_rightly_is_refused_before_the_run(tiny_llama, text, training, split, words):
    with pytest.raises(ConfigError, match=words):
        federation(tiny_llama, text, [2, 2], training={"batch_size": 3, **training}, split=split)
