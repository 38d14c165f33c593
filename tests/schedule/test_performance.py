"""Cuts by performance: the paper's rule step by step, its drift to the bounds, and the rule that rests."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from schedule.cases import WORK, client, costs, option, problems
from splitft.schedule.controllers import choose
from splitft.schedule.performance import MOST_DEPTH
from splitft.schedule.problem import ClientChoices, CutProblem, feasible, problem_of

BLOCKS = 40


def _problem(losses, current=20, weights=None, **fields) -> CutProblem:
    """Clients a, b, c, ... with these losses, all at one cut of a model of BLOCKS blocks."""
    prices = tuple(option(cut, cut, BLOCKS - cut) for cut in range(1, BLOCKS))
    clients = tuple(
        ClientChoices(
            "abcdef"[number], current, prices, loss=loss, weight=(weights or [1] * len(losses))[number]
        )
        for number, loss in enumerate(losses)
    )
    return CutProblem(clients, **{"client_blocks": current * len(losses), **fields})


def _next(problem: CutProblem, cuts) -> CutProblem:
    """The next round with equal losses, from these cuts."""
    return replace(problem, clients=tuple(replace(one, current=cuts[one.name]) for one in problem.clients))


def _moved(problem: CutProblem, controller="paper") -> list[int]:
    cuts = choose(controller, problem).cuts
    return [cuts[one.name] - one.current for one in problem.clients]


def test_paper_moves_better_clients_deeper_and_worse_ones_shallower():
    assert _moved(_problem([1.0, 2.0, 3.0])) == [1, 0, -1]
    assert _moved(_problem([1.0, 2.0, 3.0], gamma=2.0)) == [2, 0, -2]
    assert _moved(_problem([2.0, 2.0, 2.0])) == [0, 0, 0]
    assert _moved(_problem([None, 2.0, 3.0])) == [0, 0, 0]
    assert "deeper: a; worse, so shallower: c" in choose("paper", _problem([1.0, 2.0, 3.0])).reason
    some, none = _problem([None, 2.0, None]), _problem([None, None, None])
    assert choose("paper", some).reason == "no loss to go by of a, c, so cuts stay"
    assert choose("paper", none).reason == "no losses yet, so cuts stay"


@pytest.mark.parametrize(
    ("gamma", "steps"),
    [(1.0, [1, 1, -1, -1]),  # a half of the largest deviation, both ways
     (3.0, [3, 2, -2, -3]),  # 1.5
     (5.0, [5, 3, -3, -5]),  # 2.5: to the nearest even number it would be 2
     (0.9, [1, 0, 0, -1])],  # 0.45 is under a half
)  # fmt: skip
def test_paper_rounds_halves_away_from_0_on_both_sides(gamma, steps):
    """Mean 3: deviations 2, 1, -1, -2, so that the two in the middle are exactly half the largest."""
    assert _moved(_problem([1.0, 2.0, 4.0, 5.0], gamma=gamma)) == steps


def test_paper_takes_the_mean_with_the_clients_weights():
    """Mean 2.625 with weights 1, 1, 6: the second is 0.625 better. Unweighted the mean is its own loss."""
    weighted = _problem([1.0, 2.0, 3.0], weights=[1, 1, 6], gamma=2.0)
    assert _moved(weighted) == [2, 1, 0]  # 2, 2 x 0.625 / 1.625 = 0.77, and 2 x -0.375 / 1.625 = -0.46
    assert _moved(_problem([1.0, 2.0, 3.0], gamma=2.0)) == [2, 0, -2]
    assert "mean loss 2.625" in choose("paper", weighted).reason


def test_the_weight_of_a_client_is_the_tokens_that_it_trains_on_in_a_round():
    members = [client("a"), client("b", workload=replace(WORK, steps=2 * WORK.steps))]
    weights = [one.weight for one in problem_of(costs(), members, [1, 1]).clients]
    assert weights == [WORK.tokens * WORK.steps, 2 * WORK.tokens * WORK.steps]


@given(problems(), st.floats(0, 5))
def test_paper_follows_the_sign_of_the_deviation(problem, gamma):
    assume(all(one.loss is not None for one in problem.clients))
    problem = replace(problem, gamma=gamma)
    total = sum(one.weight for one in problem.clients)
    mean = sum(one.weight * one.loss for one in problem.clients) / total
    cuts, allowed = choose("paper", problem).cuts, feasible(problem)
    for one in problem.clients:
        if one.current in allowed[one.name].cuts and one.loss < mean - 1e-9:
            assert cuts[one.name] >= one.current
        if one.current in allowed[one.name].cuts and one.loss > mean + 1e-9:
            assert cuts[one.name] <= one.current


@pytest.mark.parametrize("apart", [1.0, 1e-6])
def test_with_constant_losses_paper_drifts_to_the_bounds_however_small_their_differences(apart):
    problem = _problem([2.0 - apart, 2.0, 2.0 + apart])
    for _ in range(BLOCKS):
        decision = choose("paper", problem)
        problem = _next(problem, decision.cuts)
    assert dict(decision.cuts) == {"a": BLOCKS - 1, "b": 20, "c": 1}
    assert decision.reason.endswith("held at a bound: a, c")
    assert "to their bounds" not in decision.reason
    assert (
        "such losses move them on every round, to their bounds"
        in choose("paper", _problem([1.0, 3.0])).reason
    )


def test_performance_scales_the_cuts_of_resources():
    """Mean 2.4 by weight: 2.4 / 2, 2.4 / 3 and 2.4 / 2.4 times the cut of equal machines."""
    problem = _problem([2.0, 3.0, 2.4], weights=[3, 2, 1])
    assert choose("performance", problem).cuts == {"a": 24, "b": 16, "c": 20}
    assert choose("performance", replace(problem, gamma=2.0)).cuts == {"a": 29, "b": 13, "c": 20}
    assert "cuts by resources: a 20, b 20, c 20" in choose("performance", problem).reason


def test_performance_goes_no_deeper_or_shallower_than_its_limit():
    cuts = choose("performance", _problem([0.01, 50.0, 5.0], current=10)).cuts
    assert (cuts["a"], cuts["b"]) == (10 * MOST_DEPTH, 10 / MOST_DEPTH)


@pytest.mark.parametrize("losses", [[None, 2.0, 3.0], [0.0, 2.0, 3.0], [-1.0, 2.0, 3.0], [None] * 3])
def test_without_losses_above_0_performance_is_resources(losses):
    problem = replace(_problem(losses, current=20), client_blocks=30)
    assert (
        choose("performance", problem).cuts == choose("resources", problem).cuts == dict.fromkeys("abc", 10)
    )


@given(problem=problems(), gamma=st.floats(0, 5), blocks=st.integers(1, 12))
def test_with_constant_losses_performance_moves_once_at_most(problem, gamma, blocks):
    """Its fixed point, whatever the losses: `paper` has none but the bounds."""
    problem = replace(problem, gamma=gamma, client_blocks=blocks)
    first = choose("performance", problem).cuts
    assert choose("performance", _next(problem, first)).cuts == first


@given(st.lists(st.floats(-0.45, 0.45), min_size=3, max_size=3))
def test_noise_of_less_than_a_block_moves_no_cut_of_performance(noise):
    """At cut 20, a block is 5 % of the loss; noise is below 2.25 % of it, also against the mean."""
    settled = choose("performance", _problem([2.0, 2.0, 2.0])).cuts
    noisy = _problem([2.0 * (1 + part / 20) for part in noise])
    assert choose("performance", _next(noisy, settled)).cuts == settled
