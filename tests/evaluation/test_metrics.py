"""The metrics against the libraries' own documented examples, and numbers worked out by hand."""

from __future__ import annotations

import sys
from decimal import Decimal

import pytest

from splitft.errors import RunError
from splitft.evaluation.metrics import exact_match, final_number, overlap

SAID = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
WANTED = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]


def test_bleu_is_that_of_sacrebleus_documentation():
    assert overlap(SAID, WANTED)["bleu"] == pytest.approx(48.530827009929865)


def test_rouge_l_is_that_of_rouge_scores_documentation():
    found = overlap(
        ["The quick brown dog jumps on the log."], [["The quick brown fox jumps over the lazy dog"]]
    )
    assert found["rouge_l"] == pytest.approx(0.5882352941176471)


def test_the_best_reference_counts_however_many_there_are():
    found = overlap(["a b c d e", "x y z u v"], [["q", "a b c d e", "r"], ["x y z u v"]])
    assert found == pytest.approx({"bleu": 100, "chrf": 100, "rouge_l": 1})


def test_chrf_of_disjoint_texts_is_nothing():
    found = overlap(["aaaa bbbb"], [["cccc dddd"]])
    assert (found["chrf"], found["rouge_l"]) == (0, 0)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 * 7 = 42\n#### 42", "42"),
        ("#### 1,234.50", "1234.50"),
        ("#### $18", "18"),
        ("#### -3", "-3"),
        ("#### 70000.", "70000"),
        ("#### 5 dollars\n\nQuestion: 9 #### 8", "5"),
        ("####\n7", None),
        ("the answer is 42", None),
        ("#### none", None),
    ],
)
def test_the_final_number_is_the_one_behind_the_mark(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_exact_match_compares_numbers_not_letters():
    said = ["#### 1,000", "so 5", "#### 3.0", "#### 4"]
    wanted = [["x #### 1000"], ["#### 5"], ["#### 3"], ["#### 5"]]
    assert exact_match(said, wanted) == {"exact_match": 0.5, "answered": 0.75}


def test_without_the_libraries_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(RunError, match=r"sacrebleu.*splitft\[eval\]"):
        overlap(["a"], [["a"]])
