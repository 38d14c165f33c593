"""The rules that are exact, and those that leave a factor alone: against dense products in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters.test_aggregate import FRESH, KEYS, OUT, RANKS, WIDE, _close, _mean_product, _top_ranks, members
from splitft.adapters import AdapterState, Factors, add_folded, aggregate, with_folded
from splitft.specs.rules import RULES


def _with_a_of_the_first(found):
    """The same members with the rows of A that they share, as FFA-LoRA has them."""
    generator = torch.Generator().manual_seed(0)
    A = {key: torch.randn(8, WIDE, generator=generator) for key in KEYS}
    return [
        (weight, AdapterState({key: Factors(A[key][: f.rank], f.B) for key, f in state.items()}))
        for weight, state in found
    ]


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@given(st.sampled_from(["stack", "exact"]), members())
def test_stack_and_exact_make_the_mean_product_whatever_the_ranks(rule, found):
    done = aggregate(rule, found, _top_ranks(found), FRESH)
    for key in KEYS:
        assert _relative(done.product(key), _mean_product(found, key)) < 1e-6
    assert done.error < 1e-6


@given(members())
def test_what_is_folded_has_at_most_the_rank_sum(found):
    for rule in ("stack", "exact"):
        done = aggregate(rule, found, _top_ranks(found), FRESH)
        for key, factors in done.folded.items():
            assert 0 < factors.rank <= min(sum(state[key].rank for _, state in found), OUT, WIDE)


@given(members())
def test_stack_begins_anew_and_folds_all(found):
    ranks = _top_ranks(found)
    done = aggregate("stack", found, ranks, FRESH)
    assert done.state.ranks() == ranks
    for factors in done.state.values():
        assert not torch.count_nonzero(factors.B)
        assert int(torch.linalg.matrix_rank(factors.A)) == factors.rank


@given(members(equal_ranks=True))
def test_exact_trains_on_from_the_mean_factors_and_folds_the_residual(found):
    ranks = _top_ranks(found)
    done, plain = (aggregate(rule, found, ranks, FRESH) for rule in ("exact", "factors"))
    for key in KEYS:
        assert torch.equal(done.state[key].A, plain.state[key].A)
        assert torch.equal(done.state[key].B, plain.state[key].B)
        residual = _mean_product(found, key) - plain.state[key].product().double()
        folded = done.folded[key].product() if key in done.folded else torch.zeros(OUT, WIDE)
        assert float((folded - residual).norm()) < 1e-6 * float(_mean_product(found, key).norm())


@given(st.sampled_from(sorted(RULES)), RANKS)
def test_one_client_alone_folds_nothing_but_what_stack_moves(rule, ranks):
    (_, state), *_ = found = [(2.0, _with_seed(ranks, 4))]
    done = aggregate(rule, found, ranks, FRESH)
    assert done.error < 1e-6
    assert set(done.folded) == (set(KEYS) if rule == "stack" else set())
    for key in KEYS:
        assert _relative(done.product(key), state[key].product().double()) < 1e-6


def _with_seed(ranks, seed):
    generator = torch.Generator().manual_seed(seed)
    return AdapterState({
        key: Factors(
            torch.randn(ranks[key[0]], WIDE, generator=generator),
            torch.randn(OUT, ranks[key[0]], generator=generator),
        )
        for key in KEYS
    })  # fmt: skip


@given(members())
def test_ffa_is_exact_where_all_share_their_rows_of_a(found):
    shared = _with_a_of_the_first(found)
    ranks = _top_ranks(shared)
    done = aggregate("ffa", shared, ranks, FRESH)
    assert done.error < 1e-6
    for key in KEYS:
        widest = max((state[key] for _, state in shared), key=lambda factors: factors.rank)
        assert torch.equal(done.state[key].A, widest.A)  # to the bit: it never changes
        assert _relative(done.product(key), _mean_product(shared, key)) < 1e-6


@given(members())
def test_fedsa_averages_a_row_of_a_over_those_who_have_it(found):
    ranks = _top_ranks(found)
    done = aggregate("fedsa", found, ranks, FRESH)
    for key in KEYS:
        for row in range(ranks[key[0]]):
            have = [(weight, state[key].A[row].double()) for weight, state in found if state[key].rank > row]
            mean = sum(weight * values for weight, values in have) / sum(weight for weight, _ in have)
            _close(done.state[key].A[row], mean)


@given(members(equal_ranks=True))
def test_fedsa_reports_how_far_own_b_on_the_mean_a_are_from_the_mean_update(found):
    done = aggregate("fedsa", found, _top_ranks(found), FRESH)
    total = sum(weight for weight, _ in found)
    missed = wanted = 0.0
    for key in KEYS:
        own = sum(w / total * state[key].B.double() @ done.state[key].A.double() for w, state in found)
        missed += float((_mean_product(found, key) - own).norm()) ** 2
        wanted += float(_mean_product(found, key).norm()) ** 2
    assert done.error == pytest.approx((missed / wanted) ** 0.5, abs=1e-5)


@given(members(equal_ranks=True))
def test_fedsa_needs_no_b_and_then_compares_nothing(found):
    without = [(weight, state.select("A")) for weight, state in found]
    ranks = _top_ranks(found)
    done, full = (aggregate("fedsa", listed, ranks, FRESH) for listed in (without, found))
    assert done.error == 0
    for key in KEYS:
        assert torch.equal(done.state[key].A, full.state[key].A)
        assert done.state[key].names == "A"


@given(members(), members())
def test_folded_parts_add_up_and_never_outgrow_a_full_matrix(one, other):
    parts = [aggregate("stack", found, _top_ranks(found), FRESH).folded for found in (one, other)]
    both = add_folded(*parts)
    for key in KEYS:
        assert both[key].rank <= min(OUT, WIDE)
        wanted = sum(part[key].product().double() for part in parts)
        torch.testing.assert_close(both[key].product().double(), wanted, rtol=1e-4, atol=1e-4)
    state = _with_seed({0: 2, 1: 3}, 1)
    whole = with_folded(state, both)
    for key in KEYS:
        wanted = state[key].product() + both[key].product()
        torch.testing.assert_close(whole[key].product(), wanted, rtol=1e-4, atol=1e-4)
