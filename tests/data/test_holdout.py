"""What is held out is never trained on, and its halves have nothing in common."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitft.data.holdout import evaluation_part, held_out
from splitft.data.text import Example
from splitft.errors import DataError


def _of_lengths(*lengths: int) -> list[Example]:
    return [Example(tuple(1000 * i + t for t in range(length))) for i, length in enumerate(lengths, start=1)]


LENGTHS = st.lists(st.integers(2, 60), min_size=2, max_size=40)


@given(LENGTHS, st.floats(0.01, 0.99), st.integers(0, 99), st.integers(0, 9))
def test_holding_out_loses_and_repeats_nothing(lengths, share, seed, client):
    examples = _of_lengths(*lengths)
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


@given(st.lists(st.integers(), min_size=2, max_size=9), st.none() | st.integers(1, 9))
def test_the_halves_of_the_held_out_text_have_nothing_in_common_and_are_all_of_it(numbers, most):
    held = _of_lengths(*[3] * len(numbers))
    first, second = (evaluation_part(held, half, None) for half in ("first-half", "second-half"))
    assert [*first, *second] == list(held)
    assert 0 <= len(first) - len(second) <= 1
    assert list(evaluation_part(held, "all", most)) == list(held)[:most]
    assert list(evaluation_part(held, "second-half", most)) == list(second)[:most]


def test_too_little_text_is_named():
    with pytest.raises(DataError, match=r"client 3 has 1 example\(s\), but needs 2"):
        held_out(_of_lengths(5), 0.1, seed=0, client=3)
    with pytest.raises(
        DataError, match=r"second half of 1 held-out example\(s\) is empty; raise data.holdout"
    ):
        evaluation_part(_of_lengths(5), "second-half", None)
