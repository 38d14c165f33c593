"""Membership inference: the AUC by hand, chance where nothing was learnt, certainty where all was learnt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from membership_attack import auc, by_gain, by_loss, judged, losses
from splitft.data.text import Example
from splitft.errors import DataError

SCORES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12).map(np.array)


def test_the_auc_of_five_scores_is_the_one_counted_by_hand():
    members, others = np.array([3.0, 1.0, 2.0]), np.array([2.0, 0.0])
    # 3 beats both, 1 beats 0, 2 beats 0 and ties with 2: 2 + 1 + 1.5 of 6 pairs
    assert auc(members, others) == pytest.approx(4.5 / 6)


@given(SCORES, SCORES)
def test_the_auc_is_the_share_of_pairs_won(members, others):
    won = [(a > b) + 0.5 * (a == b) for a in members for b in others]
    assert auc(members, others) == pytest.approx(float(np.mean(won)))
    assert auc(others, members) == pytest.approx(1 - auc(members, others))


def test_a_perfect_separation_finds_everyone_and_chance_finds_the_share_of_false_alarms():
    perfect = judged(np.arange(10.0) + 100, np.arange(10.0))
    assert (perfect.auc, perfect.found) == (1.0, 1.0)
    generator = np.random.default_rng(0)
    chance = judged(generator.normal(size=2000), generator.normal(size=2000))
    assert chance.low < 0.5 < chance.high
    assert chance.high - chance.low < 0.05
    assert chance.found == pytest.approx(0.05, abs=0.02)


def test_without_both_kinds_of_text_there_is_nothing_to_tell_apart():
    with pytest.raises(DataError, match="0 members, 1 others"):
        auc(np.array([]), np.array([1.0]))


@pytest.fixture(scope="module")
def texts() -> tuple[list[Example], list[Example]]:
    generator = np.random.default_rng(1)
    made = [Example(tuple(map(int, generator.integers(1, 250, 12)))) for _ in range(48)]
    return made[:24], made[24:]


def test_a_model_that_saw_no_member_gives_chance_and_one_that_learnt_them_by_heart_gives_them_away(
    tiny_llama, texts
):
    members, others = texts
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    base = losses(model, members), losses(model, others)
    untrained = by_loss(*base)
    assert untrained.low < 0.5 < untrained.high
    assert by_gain(*base, *base).auc == 0.5
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    tokens = torch.tensor([example.tokens for example in members])
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    trained = losses(model, members), losses(model, others)
    assert by_loss(*trained).auc > 0.99
    assert by_gain(*trained, *base).auc > 0.99


def test_a_text_s_loss_is_that_of_transformers_over_its_labelled_tokens(tiny_llama, texts):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokens = texts[0][0].tokens
    labels = torch.tensor([[-100] * 5 + list(tokens[5:])])
    expected = model(input_ids=torch.tensor([tokens]), labels=labels).loss
    assert losses(model, [Example(tokens, labelled_from=5)])[0] == pytest.approx(
        float(expected.detach()), rel=1e-5
    )
