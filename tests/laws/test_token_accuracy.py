"""Token accuracy beside the held-out loss: that of the unsplit model, and none where labels are protected."""

from __future__ import annotations

import pytest
import torch

from laws import methods_oracle as oracle
from laws.federations import federation, play, write_text
from laws.test_cut_invariance import _with_labels
from splitft.deploy.server.claims import HeldOutCount
from splitft.errors import ProtocolError
from splitft.protocol import Evaluation
from splitft.tracking.events import Evaluated

TRAINING = {"rounds": 1, "steps": 6, "lr": 2e-2}
CLIENTS = {"count": 3, "shares": {"by": "length", "alpha": 1.0}}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


def _right(whole, factors, batches) -> tuple[int, int]:
    """Labelled tokens that are the most probable ones of the unsplit model, and all."""
    right = count = 0
    whole._factors = factors
    for batch in batches:
        ids, labels = _with_labels(batch)
        predicted = whole.model(input_ids=ids).logits.argmax(2)[:, :-1]  # right padding: causal is enough
        right += int((predicted == labels[:, 1:]).sum())
        count += int((labels[:, 1:] != -100).sum())
    return right, count


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"split": {"labels": "server"}},
        {"clients": {**CLIENTS, "cuts": "whole"}},
        {"split": {"labels": "server"}, "devices": {"server_replicas": 2}},
    ],
    ids=str,
)
def test_it_counts_the_tokens_that_the_unsplit_model_finds_most_probable(sections, tiny_llama, text):
    prepared = federation(tiny_llama, text, [1, 2, 3], training=TRAINING, **sections)
    whole = oracle.Whole(tiny_llama, prepared.ranks.scale)
    state, events = play(prepared)
    before, after = (event for event in events if isinstance(event, Evaluated))
    for event, adapters in ((before, prepared.initial().adapters), (after, state.adapters)):
        factors = {key: (one.A, one.B) for key, one in adapters.items()}
        right = {one.name: _right(whole, factors, one.setup.held_out) for one in prepared.clients}
        assert event.accuracy_by_client == {name: found / all for name, (found, all) in right.items()}
        total, tokens = (sum(column) for column in zip(*right.values(), strict=True))
        assert event.accuracy == total / tokens
    assert after.accuracy > before.accuracy


@pytest.mark.parametrize(
    "privacy",
    [{"gradient": {"defence": "laplace", "noise": 2.0}}, {"labels": {"defence": "randomised", "epsilon": 1}}],
    ids=str,
)
def test_no_client_tells_it_while_labels_are_protected(privacy, tiny_llama, text):
    prepared = federation(tiny_llama, text, [1, 2], training={"rounds": 1, "steps": 1}, privacy=privacy)
    _, events = play(prepared)
    found = [event for event in events if isinstance(event, Evaluated)]
    assert found
    assert all(event.accuracy is None and not event.accuracy_by_client for event in found)
    assert all(client.held_out.exact.correct is None for client in prepared.clients)


def test_a_site_cannot_claim_more_right_tokens_than_the_server_has_counted():
    count = HeldOutCount(batches=1, sequences=1, tokens=5)
    claim = Evaluation(client="a", round=1, loss=5.0, tokens=5, correct=5)
    assert count.checked(claim) == claim
    assert count.checked(claim.model_copy(update={"correct": None})).correct is None  # an earlier version
    with pytest.raises(ProtocolError, match="a reports 6 right predictions of 5 held-out tokens"):
        count.checked(claim.model_copy(update={"correct": 6}))
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        Evaluation(client="a", round=1, loss=5.0, tokens=5, correct=-1)


def test_the_server_takes_its_own_count_where_it_has_the_labels():
    count = HeldOutCount(batches=1, sequences=1, tokens=5, loss=4.0, correct=2)
    claim = Evaluation(client="a", round=1, loss=0.1, tokens=5, correct=5)
    assert count.checked(claim) == claim.model_copy(update={"loss": 4.0, "correct": 2})


def test_the_accuracy_of_all_is_that_of_their_tokens_and_none_if_one_is_silent():
    from splitft.training.loss_check import evaluated

    results = {
        "a": Evaluation(client="a", round=1, loss=1.0, tokens=10, correct=5),
        "b": Evaluation(client="b", round=1, loss=1.0, tokens=30, correct=0),
        "c": Evaluation(client="c", round=1, loss=9e9, tokens=10, correct=10),
    }
    event = evaluated(1, results, {"c": "it is not like the others"}, {})
    assert (event.accuracy, event.accuracy_by_client) == (5 / 40, {"a": 0.5, "b": 0.0, "c": 1.0})
    silent = {**results, "b": results["b"].model_copy(update={"correct": None})}
    event = evaluated(1, silent, {}, {})
    assert (event.accuracy, event.accuracy_by_client) == (None, {"a": 0.5, "c": 1.0})
    assert torch.isfinite(torch.tensor(event.loss))
