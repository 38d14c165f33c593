"""Losses that clients report: what is ordinary, what is an outlier, what undoes a round."""

from __future__ import annotations

import math

import pytest

from splitft.training.loss_check import loss_outliers, round_failure

BEFORE = {"a": 2.7, "b": 2.9, "c": 2.6, "d": 4.4, "e": 2.8}


def test_other_text_is_no_outlier():
    after = {name: loss - 0.2 for name, loss in BEFORE.items()}
    assert loss_outliers(after, BEFORE) == {}
    assert loss_outliers(BEFORE, {}) == {}


@pytest.mark.parametrize("claim", [0.001, 50.0, -3.0, math.nan, math.inf, 1e30])
def test_an_absurd_claim_is_found_even_before_training(claim):
    assert set(loss_outliers({**BEFORE, "b": claim}, {})) == {"b"}


def test_a_sudden_change_that_nobody_else_sees_is_found():
    found = loss_outliers({**BEFORE, "a": 1.0}, BEFORE)
    assert found == {"a": "the median of all is 2.800, and its own last loss was 2.700"}
    assert loss_outliers({**BEFORE, "a": 1.0}, {**BEFORE, "a": 1.0}) == {}  # it always was so


@pytest.mark.parametrize("losses", [{}, {"a": 2.0}, {"a": 2.0, "b": 90.0}])
def test_fewer_than_three_are_not_compared(losses):
    assert loss_outliers(losses, BEFORE) == {}


def test_a_round_fails_only_if_the_loss_of_most_explodes():
    assert round_failure({name: loss + 1 for name, loss in BEFORE.items()}, BEFORE) == ""
    assert round_failure({**BEFORE, "a": 1e9, "b": math.nan}, BEFORE) == ""
    reason = round_failure({**BEFORE, "a": 1e9, "b": math.nan, "d": 20.0}, BEFORE)
    assert reason == "the held-out loss rose beyond use on 3 of 5 clients (a: 2.700 before, 1e+09 after)"
