"""Who takes part in a round, and what a round makes of the state before."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laws.federations import federation, play, write_text
from splitft.tracking.events import Evaluated, RoundDone, StepDone
from splitft.training.rounds import participants_of

NAMES = [f"client-{index}" for index in range(1, 11)]


@given(
    number=st.integers(1, 500),
    count=st.integers(1, 10),
    share=st.floats(0.001, 1.0),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_share_of_the_clients_takes_part_in_their_order_and_never_nobody(number, count, share, seed):
    names = NAMES[:count]
    drawn = participants_of(number, names, share, seed)
    assert len(drawn) == max(1, round(share * count))
    assert drawn == [name for name in names if name in set(drawn)]
    assert drawn == participants_of(number, names, share, seed)


def test_all_take_part_when_all_should():
    assert participants_of(3, NAMES, 1.0, 0) == NAMES


def test_every_client_has_its_turn_about_equally_often():
    turns = Counter(name for number in range(1, 2001) for name in participants_of(number, NAMES, 0.3, 1))
    assert all(540 < turns[name] < 660 for name in NAMES)  # 600 expected, standard deviation 20


def test_rounds_and_seeds_draw_differently():
    draws = {tuple(participants_of(number, NAMES, 0.5, seed)) for number in (1, 2, 3) for seed in (0, 1, 2)}
    assert len(draws) > 6


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


def test_only_who_was_drawn_trains_and_everyone_is_evaluated(tiny_llama, text):
    training = {"rounds": 4, "steps": 2, "participation": 0.5}
    prepared = federation(tiny_llama, text, [1, 2, 3, 2], training=training)
    names = [client.name for client in prepared.clients]
    state, events = play(prepared)
    for number in range(1, 5):
        drawn = participants_of(number, names, 0.5, 0)
        done = next(e for e in events if isinstance(e, RoundDone) and e.round == number)
        steps = Counter(e.client for e in events if isinstance(e, StepDone) and e.round == number)
        evaluated = next(e for e in events if isinstance(e, Evaluated) and e.round == number)
        assert list(done.participants) == drawn
        assert steps == dict.fromkeys(drawn, 2)
        assert list(evaluated.by_client) == names
    assert state.round == 4
    assert {client.name: client.steps for client in prepared.clients} == Counter(
        event.client for event in events if isinstance(event, StepDone)
    )


def test_the_state_after_has_the_layers_and_ranks_that_the_cuts_ask_for(tiny_llama, text):
    training = {"rounds": 2, "steps": 1}
    prepared = federation(
        tiny_llama, text, [1, 2], training=training, lora={"rank_at_cut": 2}, aggregate={"rule": "svd"}
    )
    before = prepared.initial()
    state, _ = play(prepared)
    assert (state.round, dict(state.cuts)) == (2, {"client-1": 1, "client-2": 2})
    assert state.adapters.keys() == before.adapters.keys()
    # lowered next to cut 1: blocks 0 and 1; next to cut 2: blocks 1 and 2; the higher of both is kept
    assert state.adapters.ranks() == {0: 4, 1: 2, 2: 4, 3: 4}


def test_the_loss_of_all_is_that_of_each_weighted_by_tokens(tiny_llama, text):
    prepared = federation(tiny_llama, text, [1, 2], training={"rounds": 1, "steps": 1})
    tokens = {
        client.name: sum(batch.labelled_tokens for batch in client.setup.held_out)
        for client in prepared.clients
    }
    _, events = play(prepared)
    for event in events:
        if isinstance(event, Evaluated):
            total = sum(event.by_client[name] * count for name, count in tokens.items())
            assert event.loss == pytest.approx(total / sum(tokens.values()), rel=1e-12)
