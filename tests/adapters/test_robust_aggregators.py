"""Rules that withstand hostile members: whatever f of n send, the result is where the honest ones are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitft.adapters import AdapterState, Factors, Fresh, aggregate
from splitft.adapters.aggregate import hostile_members
from splitft.errors import FailedRoundError
from splitft.specs.rules import RULES

WIDE, OUT, FRESH = 7, 5, Fresh(0, salt=1)
ATTACKS = ("huge", "flipped", "zero", "noise", "one number", "unbalanced")
ROBUST = sorted(name for name, rule in RULES.items() if rule.withstands)


def _honest(seed: int, rank: int) -> AdapterState:
    """Factors near common ones, over two layers."""
    common, own = torch.Generator().manual_seed(1), torch.Generator().manual_seed(seed)

    def near(*shape: int) -> torch.Tensor:
        return torch.randn(4, *shape, generator=common)[0] + 0.1 * torch.randn(shape, generator=own)

    full = {(block, "q"): Factors(near(4, WIDE), near(OUT, 4)) for block in (0, 1)}
    return AdapterState({key: factors.first(rank) for key, factors in full.items()})


def _hostile(kind: str, seed: int, rank: int) -> AdapterState:
    def spoilt(factors: Factors) -> Factors:
        A, B = factors.A.clone(), factors.B.clone()
        match kind:
            case "huge":
                return Factors(A * 1e15, B * 1e15)  # products of 1e30
            case "flipped":
                return Factors(-A, B * 3)
            case "zero":
                return Factors(A * 0, B * 0)
            case "noise":
                return Factors(torch.randn(A.shape), torch.randn(B.shape))
            case "one number":
                B[0, 0] = 1e30
                return Factors(A, B)
            case _:
                return Factors(A * 1e12, B * 1e-12)

    return AdapterState({key: spoilt(one) for key, one in _honest(seed, rank).items()})


SITES = st.tuples(st.integers(5, 9), st.lists(st.sampled_from(ATTACKS), min_size=4, max_size=4))


def _members(rule, sites, rank_of):
    """As many hostile members as the rule withstands, among honest ones: all members, and the honest."""
    count, kinds = sites
    hostile = RULES[rule].withstands(count)
    states = [
        _hostile(kinds[i], i, rank_of(i)) if i < hostile else _honest(i, rank_of(i)) for i in range(count)
    ]
    members = [(1000.0 if i < hostile else 1.0, state) for i, state in enumerate(states)]
    return members, states[hostile:], hostile


@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
@given(sites=SITES)
def test_each_number_stays_within_the_honest_ones(rule, sites):
    members, honest, hostile = _members(rule, sites, lambda _: 3)
    done = aggregate(rule, members, {0: 3, 1: 3}, FRESH, hostile)
    for name, found in done.state.tensors().items():
        numbers = torch.stack([state.tensors()[name] for state in honest])
        assert (found >= numbers.min(0).values - 1e-6).all()
        assert (found <= numbers.max(0).values + 1e-6).all()


@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
@given(sites=SITES)
def test_with_unequal_ranks_each_number_of_the_product_does(rule, sites):
    """The wanted rank is that of the whole matrix here, so nothing is lost to the approximation."""
    members, honest, hostile = _members(rule, sites, lambda index: 2 + index % 3)
    done = aggregate(rule, members, {0: 5, 1: 5}, FRESH, hostile)
    for key, found in done.state.items():
        products = torch.stack([state[key].product() for state in honest])
        within = 1e-3 * float(products.abs().max())
        assert (found.product() >= products.min(0).values - within).all()
        assert (found.product() <= products.max(0).values + within).all()


@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("mixed", [False, True])
@given(sites=SITES)
def test_krum_stays_near_the_honest_ones(mixed, sites):
    members, honest, hostile = _members("krum", sites, lambda index: 2 + index % 3 * mixed)
    done = aggregate("krum", members, {0: 5, 1: 5}, FRESH, hostile)
    for key in honest[0]:
        products = torch.stack([state[key].product() for state in honest]).double()
        ball = max(float((one - other).norm()) for one in products for other in products)
        farthest = max(float((done.product(key).double() - one).norm()) for one in products)
        # each of n - f selected is as near as honest members are to each other, times n (proposition 4.2)
        assert farthest <= len(members) * max(ball, 1e-3)


@pytest.mark.parametrize("rule", ["factors", "zero-pad", "svd"])
def test_one_member_moves_a_mean_anywhere(rule):
    members = [(1.0, _hostile("huge", 0, 3)), *((1.0, _honest(i, 3)) for i in range(1, 6))]
    assert float(aggregate(rule, members, {0: 3, 1: 3}, FRESH).product((0, "q")).abs().max()) > 1e20


def test_one_hostile_member_more_than_the_breakdown_point_moves_the_median():
    members = [(1.0, _hostile("huge", i, 3)) for i in range(3)] + [(1.0, _honest(i, 3)) for i in (3, 4)]
    assert float(aggregate("median", members, {0: 3, 1: 3}, FRESH).product((0, "q")).abs().max()) > 1e20


def test_the_median_of_products_is_the_dense_one_where_the_rank_has_room():
    members = [(1.0, _honest(i, rank)) for i, rank in enumerate((2, 3, 4))]
    done = aggregate("median", members, {0: 5, 1: 5}, FRESH)
    for key in members[0][1]:
        dense = torch.stack([state[key].product() for _, state in members]).median(0).values
        torch.testing.assert_close(done.product(key), dense, rtol=1e-4, atol=1e-4)


def test_more_hostile_members_than_a_rule_withstands_fail_the_round():
    members = [(1.0, _honest(i, 3)) for i in range(4)]
    with pytest.raises(FailedRoundError, match="withstands 0 hostile of 4 participants"):
        aggregate("krum", members, {0: 3, 1: 3}, FRESH, 1)


@pytest.mark.parametrize(("count", "expected"), [(1, 0), (2, 0), (3, 1), (5, 1), (6, 2), (10, 2), (11, 3)])
def test_a_fifth_is_withstood_by_default(count, expected):
    assert hostile_members("trimmed-mean", count, None) == expected
    assert hostile_members("krum", count, None) == min(expected, max(0, (count - 3) // 2))


@pytest.mark.parametrize("rule", ROBUST)
def test_a_weight_does_not_outvote_the_others(rule):
    members = [(1.0, _honest(i, 3)) for i in range(5)]
    heavy = [(1e6 if index == 2 else 1.0, state) for index, (_, state) in enumerate(members)]
    for key in members[0][1]:
        one, other = (aggregate(rule, given, {0: 3, 1: 3}, FRESH).product(key) for given in (members, heavy))
        assert torch.equal(one, other)
