"""What was read is counted as one would by hand."""

from __future__ import annotations

import math

import pytest

from splitft.audit.recovery import measure_recovery, rouge_l, word_kinds, words

PIECES = dict(enumerate(("The", " patient", " Ann", "a", " is", " 4", "7", ".")))
TEXT = tuple(range(8))  # The patient Anna is 47.


def test_tokens_are_counted_at_their_own_places_and_by_the_kind_of_their_word():
    read = [0, 1, 2, 2, 4, 5, 5, 7]  # wrong: the second half of Anna, and the 7
    found = measure_recovery([TEXT], [read], PIECES.__getitem__)
    assert found.count == 8
    assert found.tokens == pytest.approx(6 / 8)
    assert found.rare == pytest.approx(2 / 4)  # Ann-a, 4-7
    assert found.function == 1.0  # The, is
    assert found.sentences == 0.0
    assert found.error == pytest.approx(math.sqrt(0.75 * 0.25 / 8))


def test_a_text_counts_as_read_only_without_a_fault():
    found = measure_recovery([TEXT, TEXT], [TEXT, (1, *TEXT[1:])], PIECES.__getitem__)
    assert found.sentences == 0.5
    assert found.tokens == pytest.approx(15 / 16)


def test_names_and_numbers_are_told_from_function_words():
    kinds = word_kinds([PIECES[token] for token in TEXT])
    assert kinds == ["function", "other", "rare", "rare", "function", "rare", "rare", "other"]


def test_words_are_put_together_from_tokens_and_parted_from_punctuation():
    assert words([PIECES[token] for token in TEXT]) == ["the", "patient", "anna", "is", "47", "."]


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    # Lin 2004: "police killed the gunman" against "police kill the gunman" has 3 of 4 words in order
    assert rouge_l(["police", "killed", "the", "gunman"], ["police", "kill", "the", "gunman"]) == 0.75
    assert rouge_l(["police", "killed", "the", "gunman"], ["the", "gunman", "kill", "police"]) == 0.5
    assert rouge_l(["a", "b", "c"], ["a", "c"]) == pytest.approx(2 * 2 / 5)
    assert rouge_l([], []) == 1.0
    assert rouge_l(["a"], []) == 0.0


def test_nothing_to_recover_is_not_a_number():
    found = measure_recovery([(1,)], [(1,)], PIECES.__getitem__)
    assert math.isnan(found.rare)
    assert found.tokens == 1.0
