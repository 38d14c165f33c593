"""Batches: what they hold against direct loops, and what the order of an epoch promises."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitft.data.text import Batch, BatchStream, Example, eval_batches, evaluation_part, held_out
from splitft.errors import DataError


@st.composite
def _examples(draw, smallest=1, most=40):
    lengths = draw(st.lists(st.integers(2, 60), min_size=smallest, max_size=most))
    return [
        Example(tuple(1000 * i + t for t in range(length)), draw(st.integers(1, length - 1)))
        for i, length in enumerate(lengths, start=1)
    ]


def _of_lengths(*lengths: int) -> list[Example]:
    return [Example(tuple(1000 * i + t for t in range(length))) for i, length in enumerate(lengths, start=1)]


def _examples_in(batches: list[Batch]) -> Counter[tuple[int, ...]]:
    return Counter(
        tuple(row[:length])
        for batch in batches
        for row, length in zip(batch.tokens.tolist(), batch.lengths, strict=True)
    )


BUDGETS = st.none() | st.integers(1, 200)


@given(examples=_examples())
def test_positions_and_targets_are_those_of_a_direct_loop(examples):
    batch = Batch.of(examples)
    expected = [
        (row, place, example.tokens[place + 1])
        for row, example in enumerate(examples)
        for place in range(len(example) - 1)
        if place + 1 >= example.labelled_from
    ]
    rows, columns = batch.positions()
    assert list(zip(rows.tolist(), columns.tolist(), batch.targets().tolist(), strict=True)) == expected
    assert batch.labelled_tokens == len(expected)


@given(examples=_examples())
def test_a_batch_is_its_examples_padded_on_the_right(examples):
    batch = Batch.of(examples)
    assert batch.tokens.dtype == torch.int64
    assert batch.tokens.shape == (len(examples), max(map(len, examples)))
    assert batch.lengths == tuple(map(len, examples))
    for row, example in zip(batch.tokens.tolist(), examples, strict=True):
        assert row == list(example.tokens) + [0] * (len(row) - len(example))


def test_a_pair_of_positions_picks_hidden_states_at_once():
    batch = Batch.of([Example((5, 6, 7), 2), Example((8, 9), 1)])
    hidden = torch.arange(2 * 3 * 4).reshape(2, 3, 4)
    assert torch.equal(hidden[batch.positions()], torch.stack([hidden[0, 1], hidden[1, 0]]))
    assert batch.targets().tolist() == [7, 9]


@given(_examples(), st.integers(1, 9), BUDGETS, st.integers(0, 99), st.integers(0, 9), st.integers(0, 5))
def test_an_epoch_covers_every_example_once(examples, batch_size, budget, seed, client, epoch):
    stream = BatchStream(examples, batch_size, budget, seed, client)
    first = sum(len(stream.epoch(before)) for before in range(epoch))
    batches = [stream.batch(first + place) for place in range(len(stream.epoch(epoch)))]
    assert _examples_in(batches) == Counter(example.tokens for example in examples)


@given(_examples(), st.integers(1, 9), BUDGETS, st.permutations(range(12)))
def test_a_batch_depends_on_nothing_but_the_step(examples, batch_size, budget, steps):
    in_turn = BatchStream(examples, batch_size, budget, seed=3, client=1)
    expected = [in_turn.batch(step) for step in range(12)]
    jumping = BatchStream(examples, batch_size, budget, seed=3, client=1)
    for step in steps:
        assert torch.equal(jumping.batch(step).tokens, expected[step].tokens)
        assert jumping.batch(step).labelled_from == expected[step].labelled_from


@given(_examples(), st.integers(1, 9), st.integers(0, 3))
def test_batches_by_number_differ_in_size_by_one_at_most(examples, batch_size, epoch):
    sizes = [len(batch) for batch in BatchStream(examples, batch_size).epoch(epoch)]
    assert len(sizes) == -(-len(examples) // batch_size)
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= batch_size


@given(_examples(), st.integers(1, 200), st.integers(0, 3))
def test_batches_by_tokens_keep_to_the_budget_unless_one_example_breaks_it(examples, budget, epoch):
    stream = BatchStream(examples, 4, budget)
    batches = [Batch.of([examples[i] for i in part]) for part in stream.epoch(epoch)]
    for batch in batches + eval_batches(examples, 4, budget):
        assert batch.tokens.numel() <= budget or len(batch.lengths) == 1


def test_fewer_examples_than_a_batch_are_a_batch():
    stream = BatchStream(_of_lengths(3, 4), batch_size=8)
    assert [len(stream.batch(step).lengths) for step in range(3)] == [2, 2, 2]


def test_epochs_clients_and_seeds_have_orders_of_their_own():
    examples = _of_lengths(*range(10, 74))
    orders = {
        tuple(tuple(part) for part in BatchStream(examples, 4, None, seed, client).epoch(epoch))
        for seed in (0, 1)
        for client in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 8


def test_batches_come_neither_by_length_nor_always_with_the_same_company():
    examples = _of_lengths(*range(10, 138))
    stream = BatchStream(examples, 4)
    longest = [max(len(examples[i]) for i in part) for part in stream.epoch(0)]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))
    company = [{frozenset(part.tolist()) for part in stream.epoch(epoch)} for epoch in (0, 1)]
    assert len(company[0] & company[1]) < len(company[0]) / 2


@pytest.mark.parametrize(("batch_size", "budget"), [(4, None), (16, None), (4, 1024)])
def test_sorting_within_windows_wastes_a_quarter_of_the_padding_of_a_shuffle(batch_size, budget):
    generator = np.random.default_rng(0)
    examples = _of_lengths(*np.clip(generator.lognormal(4, 0.7, 2000), 2, 256).astype(int).tolist())
    stream = BatchStream(examples, batch_size, budget)
    parts = stream.epoch(0)
    sorted_waste = _waste([[len(examples[i]) for i in part] for part in parts])
    shuffled = generator.permutation(len(examples))
    shuffled_waste = _waste(
        [[len(examples[i]) for i in part] for part in np.array_split(shuffled, len(parts))]
    )
    assert sorted_waste < shuffled_waste / 4


def _waste(batches: list[list[int]]) -> float:
    """Padding by real tokens."""
    padded = sum(len(batch) * max(batch) for batch in batches)
    return padded / sum(sum(batch) for batch in batches) - 1


@given(_examples(smallest=2), st.floats(0.01, 0.99), st.integers(0, 99), st.integers(0, 9))
def test_holding_out_loses_and_repeats_nothing(examples, share, seed, client):
    training, kept_out = held_out(examples, share, seed, client)
    assert Counter(training) + Counter(kept_out) == Counter(examples)
    assert len(training) >= 1
    assert len(kept_out) >= 1
    assert abs(len(kept_out) - share * len(examples)) <= 1
    assert (training, kept_out) == held_out(examples, share, seed, client)


def test_the_held_out_part_is_drawn_from_everywhere_and_by_seed_and_client():
    examples = _of_lengths(*[5] * 100)
    drawn = [held_out(examples, 0.2, seed, client)[1] for seed, client in [(0, 0), (1, 0), (0, 1)]]
    assert len(set(drawn)) == 3
    first_ones = [example.tokens[0] // 1000 for example in drawn[0][:5]]
    assert first_ones != sorted(first_ones)  # a limit on evaluation takes a sample, not the beginning


@given(_examples(), st.integers(1, 9), BUDGETS)
def test_evaluation_covers_every_example_once(examples, batch_size, budget):
    batches = eval_batches(examples, batch_size, budget)
    assert _examples_in(batches) == Counter(example.tokens for example in examples)
    longest = [max(batch.lengths) for batch in batches]
    assert longest == sorted(longest)


@given(st.lists(st.integers(), min_size=2, max_size=9), st.none() | st.integers(1, 9))
def test_the_halves_of_the_held_out_text_have_nothing_in_common_and_are_all_of_it(numbers, most):
    held = _of_lengths(*[3] * len(numbers))
    first, second = (evaluation_part(held, half, None) for half in ("first-half", "second-half"))
    assert [*first, *second] == list(held)
    assert 0 <= len(first) - len(second) <= 1
    assert list(evaluation_part(held, "all", most)) == list(held)[:most]
    assert list(evaluation_part(held, "second-half", most)) == list(second)[:most]


@pytest.mark.parametrize(("tokens", "labelled_from"), [((), 1), ((1,), 1), ((1, 2), 0), ((1, 2), 2)])
def test_an_example_without_a_labelled_token_cannot_exist(tokens, labelled_from):
    with pytest.raises(DataError, match="cannot carry loss"):
        Example(tokens, labelled_from)


def test_too_little_text_is_named():
    with pytest.raises(DataError, match="client 3 has no examples"):
        BatchStream([], 4, client=3)
    with pytest.raises(DataError, match=r"client 3 has 1 example\(s\), but needs 2"):
        held_out(_of_lengths(5), 0.1, seed=0, client=3)
    with pytest.raises(
        DataError, match=r"second half of 1 held-out example\(s\) is empty; raise data.holdout"
    ):
        evaluation_part(_of_lengths(5), "second-half", None)
    with pytest.raises(DataError, match="no held-out examples"):
        eval_batches([], 4)
    with pytest.raises(DataError, match="at least one example"):
        Batch.of([])
    with pytest.raises(DataError, match="counted from 0"):
        BatchStream(_of_lengths(5), 4).batch(-1)
