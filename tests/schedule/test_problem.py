"""The problem of a controller: prices corrected by measurements, and the numbers that are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from schedule.cases import option
from splitft.errors import ScheduleError
from splitft.schedule.problem import ClientChoices, CutProblem, corrected, measured_ratios


def test_the_ratio_of_a_measured_leg_is_applied_at_every_cut():
    prices = tuple(option(cut, 10 * cut, 9 - cut, link_s=4) for cut in range(1, 4))
    one = ClientChoices("a", 2, prices, measured={"client_forward": 40.0, "head": 3.0})
    assert measured_ratios(one) == {"client_forward": 2.0}  # 40 s instead of 20 s; no head was predicted
    assert [price.compute_s for price in corrected(one)] == [20, 40, 60]
    assert [price.own_s for price in corrected(one)] == [20 + 8 + 4, 40 + 7 + 4, 60 + 6 + 4]
    assert corrected(replace(one, measured={})) == prices
    assert corrected(replace(one, current=4)) == prices  # no price to compare with


@pytest.mark.parametrize("fields", [{"loss": float("nan")}, {"weight": 0.0}, {"measured": {"head": -1.0}}])
def test_numbers_that_mean_nothing_are_refused(fields):
    with pytest.raises(ScheduleError, match="client 'a'"):
        ClientChoices("a", 1, (option(1, 1, 1),), **fields)


def test_clients_have_names_of_their_own():
    one = ClientChoices("a", 1, (option(1, 1, 1),))
    with pytest.raises(ScheduleError, match="a name of its own"):
        CutProblem((one, one))
