"""Batches: what they hold against direct loops, and what the order of an epoch promises."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitft.data.text import Batch, BatchStream, Example, eval_batches
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


@given(_examples(), st.integers(1, 9), BUDGETS)
def test_evaluation_covers_every_example_once(examples, batch_size, budget):
    batches = eval_batches(examples, batch_size, budget)
    assert _examples_in(batches) == Counter(example.tokens for example in examples)
    longest = [max(batch.lengths) for batch in batches]
    assert longest == sorted(longest)


@pytest.mark.parametrize(("tokens", "labelled_from"), [((), 1), ((1,), 1), ((1, 2), 0), ((1, 2), 2)])
def test_an_example_without_a_labelled_token_cannot_exist(tokens, labelled_from):
    with pytest.raises(DataError, match="cannot carry loss"):
        Example(tokens, labelled_from)


def test_too_little_text_is_named():
    with pytest.raises(DataError, match="client 3 has no examples"):
        BatchStream([], 4, client=3)
    with pytest.raises(DataError, match="no held-out examples"):
        eval_batches([], 4)
    with pytest.raises(DataError, match="at least one example"):
        Batch.of([])
    with pytest.raises(DataError, match="counted from 0"):
        BatchStream(_of_lengths(5), 4).batch(-1)
