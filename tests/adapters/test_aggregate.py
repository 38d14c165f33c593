"""Aggregation against dense products in float64: what each rule promises, and the error that it reports."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from splitft.adapters import AdapterState, Factors, Fresh, United, aggregate, fit, fit_all
from splitft.adapters.factoring import A_ROW_NORM, LEAST_STRETCH
from splitft.errors import AdapterError, PluginError
from splitft.specs import AggregateSpec
from splitft.specs.rules import RULES, Rule

FRESH = Fresh(seed=0, salt=1)
KEYS = [(0, "q"), (0, "v"), (1, "q")]
WIDE, OUT = 9, 7

Members = list[tuple[float, AdapterState]]


def _state(ranks: dict[int, int], seed: int, zero: bool = False) -> AdapterState:
    generator = torch.manual_seed(seed)
    factors = {}
    for key in KEYS:
        rank = ranks[key[0]]
        A, B = torch.randn(rank, WIDE, generator=generator), torch.randn(OUT, rank, generator=generator)
        factors[key] = Factors(A, B * 0 if zero else B)
    return AdapterState(factors)


RANKS = st.tuples(st.integers(1, 5), st.integers(1, 5)).map(lambda pair: dict(enumerate(pair)))
WEIGHTS = st.floats(0.1, 50)


@st.composite
def members(draw, equal_ranks: bool = False, most: int = 5) -> Members:
    count, seed = draw(st.integers(1, most)), draw(st.integers(0, 99))
    shared = draw(RANKS)
    return [
        (draw(WEIGHTS), _state(shared if equal_ranks else draw(RANKS), 100 * seed + i)) for i in range(count)
    ]


def _weights(found: Members) -> list[float]:
    total = sum(weight for weight, _ in found)
    return [weight / total for weight, _ in found]


def _mean_product(found: Members, key) -> torch.Tensor:
    """sum w_i B_i A_i, dense, in float64."""
    products = [state[key].B.double() @ state[key].A.double() for _, state in found]
    return sum(w * product for w, product in zip(_weights(found), products, strict=True))


def _close(a: torch.Tensor, b: torch.Tensor, within: float = 1e-5) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=within, atol=within)


def _as_the_rule_has_them(rule: str, found: Members) -> Members:
    """The half that a rule freezes or leaves to the client is the same for all: A with ffa, B with fedsa."""
    common = {"ffa": "A", "fedsa": "B"}.get(rule)
    if common is None:
        return found
    first = found[0][1]
    return [
        (weight, AdapterState({
            key: replace(factors, **{common: getattr(first[key], common)}) for key, factors in state.items()
        }))
        for weight, state in found
    ]  # fmt: skip


def _top_ranks(found: Members) -> dict[int, int]:
    return {block: max(state.ranks()[block] for _, state in found) for block in (0, 1)}


def test_every_rule_of_the_configuration_is_there_and_no_other():
    for name in RULES:
        assert AggregateSpec(rule=name).rule == name
        assert AggregateSpec.model_json_schema()["properties"]["rule"]["enum"] == list(RULES)
    with pytest.raises(ValidationError, match="no such aggregation rule; give one of factors, zero-pad, svd"):
        AggregateSpec(rule="mean")


@given(st.sampled_from(sorted(RULES)), RANKS, WEIGHTS)
def test_one_client_alone_keeps_its_products(rule, ranks, weight):
    state = _state(ranks, 3)
    done = aggregate(rule, [(weight, state)], ranks, FRESH)
    for key in KEYS:
        _close(done.product(key), state[key].product())
    assert done.state.ranks() == ranks
    assert done.error < 1e-5


@given(st.sampled_from(sorted(RULES)), members(equal_ranks=True), st.randoms(use_true_random=False))
def test_the_order_of_the_clients_does_not_matter(rule, found, random):
    found = _as_the_rule_has_them(rule, found)
    shuffled = random.sample(found, len(found))
    ranks = _top_ranks(found)
    one, other = (aggregate(rule, listed, ranks, FRESH) for listed in (found, shuffled))
    for key in KEYS:
        _close(one.product(key), other.product(key), 1e-4)
    assert one.error == pytest.approx(other.error, abs=1e-5)


@given(st.sampled_from(sorted(RULES)), members(equal_ranks=True), st.floats(0.01, 1000))
def test_only_the_proportions_of_the_weights_matter(rule, found, scale):
    ranks = _top_ranks(found)
    one = aggregate(rule, found, ranks, FRESH)
    other = aggregate(rule, [(weight * scale, state) for weight, state in found], ranks, FRESH)
    for key in KEYS:
        _close(one.product(key), other.product(key), 1e-4)


@given(members(equal_ranks=True))
def test_factors_is_the_mean_of_a_and_the_mean_of_b(found):
    done = aggregate("factors", found, _top_ranks(found), FRESH)
    for key in KEYS:
        for half in ("A", "B"):
            parts = torch.stack([getattr(state[key], half).double() for _, state in found])
            expected = torch.einsum("n,nij->ij", torch.tensor(_weights(found), dtype=torch.float64), parts)
            _close(getattr(done.state[key], half), expected)


@given(members())
def test_zero_pad_is_the_mean_row_by_row_over_those_who_have_the_row(found):
    done = aggregate("zero-pad", found, _top_ranks(found), FRESH)
    for key in KEYS:
        for row in range(_top_ranks(found)[key[0]]):
            A, B = torch.zeros(WIDE, dtype=torch.float64), torch.zeros(OUT, dtype=torch.float64)
            for weight, (_, state) in zip(_weights(found), found, strict=True):
                if row < state[key].rank:
                    A += weight * state[key].A[row].double()
                    B += weight * state[key].B[:, row].double()
            _close(done.state[key].A[row], A)
            _close(done.state[key].B[:, row], B)


@given(members(), RANKS)
def test_svd_is_the_best_approximation_of_the_mean_product(found, ranks):
    """Eckart and Young: the truncated singular value decomposition of the dense mean."""
    done = aggregate("svd", found, ranks, FRESH)
    for key in KEYS:
        U, S, Vh = torch.linalg.svd(_mean_product(found, key), full_matrices=False)
        rank = ranks[key[0]]
        best = U[:, :rank] * S[:rank] @ Vh[:rank]
        left = (S[rank:] ** 2).sum().sqrt()
        _close(done.state[key].product(), best, 1e-4)
        missed = (_mean_product(found, key) - done.state[key].product().double()).norm()
        assert float(missed) <= float(left) + 1e-5 * float(S[0])


@given(members(most=1), st.integers(1, 4))
def test_what_one_client_trained_comes_back_from_svd_as_it_was(found, copies):
    """In the frame of A itself, B A keeps its factors, so that training goes on undisturbed."""
    done = aggregate("svd", found * copies, _top_ranks(found), FRESH)
    for key in KEYS:
        if float(torch.linalg.svdvals(found[0][1][key].A)[-1]) > LEAST_STRETCH * A_ROW_NORM:
            _close(done.state[key].A, found[0][1][key].A, 1e-4)
            _close(done.state[key].B, found[0][1][key].B, 1e-4)


@given(members(equal_ranks=True))
def test_svd_writes_a_as_the_mean_rows_in_the_product_s_directions_and_never_flat(found):
    ranks = _top_ranks(found)
    done = aggregate("svd", found, ranks, FRESH)
    for key in KEYS:
        mean = sum(w * state[key].A.double() for w, (_, state) in zip(_weights(found), found, strict=True))
        V = torch.linalg.svd(_mean_product(found, key)).Vh[: ranks[key[0]]]
        stretch = torch.linalg.svdvals(mean @ V.T)
        least = LEAST_STRETCH * A_ROW_NORM
        _close(torch.linalg.svdvals(done.state[key].A.double()), stretch.clamp(min=least), 1e-4)
        if float(stretch[-1]) > least:
            _close(done.state[key].A, mean @ V.T @ V, 1e-4)


UNEQUAL = sorted(set(RULES) - {"factors"})


@given(st.sampled_from(UNEQUAL), members(), RANKS)
def test_the_reported_error_is_that_of_the_dense_products(rule, found, ranks):
    done = aggregate(rule, found, ranks, FRESH)
    dense = torch.cat([_mean_product(found, key).flatten() for key in KEYS])
    made = torch.cat([done.product(key).double().flatten() for key in KEYS])
    assert done.error == pytest.approx(float((dense - made).norm() / dense.norm()), abs=1e-5)


def test_averaging_factors_apart_is_wrong_where_svd_is_exact():
    """Two clients of rank 1 that point at right angles: their mean has rank 2, and so has room."""
    eye = torch.eye(WIDE)[:2]
    one, two = (
        AdapterState({(0, "q"): Factors(eye[i : i + 1], torch.eye(OUT)[:, i : i + 1])}) for i in (0, 1)
    )
    found = [(1.0, one), (1.0, two)]
    assert aggregate("svd", found, {0: 2}, FRESH).error < 1e-6
    # mean(B) mean(A) is a quarter of the matrix of ones; the mean is half of the identity
    assert aggregate("factors", found, {0: 1}, FRESH).error == pytest.approx(2**-0.5)


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"stack"}))  # which begins anew each round
def test_before_anything_is_learnt_the_directions_stay_and_the_error_is_zero(rule):
    ranks = {0: 3, 1: 2}
    state = _state(ranks, 0, zero=True)
    done = aggregate(rule, [(1.0, state), (2.0, state)], ranks, FRESH)
    assert done.error == 0
    for key in KEYS:
        _close(done.state[key].A, state[key].A)
        assert torch.count_nonzero(done.state[key].B) == 0


class _LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return out


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"factors"}))
def test_no_rule_makes_a_matrix_of_the_width_squared(rule):
    wide, ranks = 4096, (2, 4, 3)
    found = []
    for number, rank in enumerate(ranks):
        generator = torch.manual_seed(number)
        A, B = torch.randn(rank, wide, generator=generator), torch.randn(wide, rank, generator=generator)
        found.append((1.0, AdapterState({(0, "q"): Factors(A, B)})))
    with _LargestTensor() as largest:
        aggregate(rule, found, {0: 4}, FRESH)
    # the factors of the mean and of what a rule made of it, stacked
    assert largest.numel <= wide * (2 * sum(ranks) + max(ranks))


FITS = given(st.sampled_from(sorted(RULES)), st.integers(1, 5), st.integers(1, 5))


@FITS
def test_growing_a_rank_changes_no_product_and_gives_new_directions(rule, rank, extra):
    factors = _state({0: rank, 1: rank}, 5)[0, "q"]
    grown = fit((0, "q"), factors, rank + extra, rule, FRESH)
    assert grown.rank == rank + extra
    assert torch.equal(grown.product(), factors.product())
    assert torch.equal(grown.A[:rank], factors.A)
    assert torch.count_nonzero(grown.A[rank:]) == grown.A[rank:].numel()


@FITS
def test_shrinking_keeps_the_first_rows_or_the_best_fit(rule, rank, extra):
    factors = _state({0: rank + extra, 1: 1}, 5)[0, "q"]
    small = fit((0, "q"), factors, rank, rule, FRESH)
    assert small.rank == rank
    if RULES[rule].best_fit:
        U, S, Vh = torch.linalg.svd(factors.product().double(), full_matrices=False)
        _close(small.product(), U[:, :rank] * S[:rank] @ Vh[:rank], 1e-4)
    else:
        assert torch.equal(small.A, factors.A[:rank])
        assert torch.equal(small.B, factors.B[:, :rank])


def test_a_whole_state_is_fitted_block_by_block():
    fitted = fit_all(_state({0: 3, 1: 3}, 0), {0: 2, 1: 5}, "svd", FRESH)
    assert fitted.ranks() == {0: 2, 1: 5}
    assert list(fitted) == KEYS


def test_directions_without_weight_become_fresh_ones():
    """A client of rank 3 whose product has rank 1: the other two rows are free to learn."""
    B = torch.randn(OUT, 1, generator=torch.manual_seed(0)).expand(OUT, 3).clone()
    A = torch.randn(3, WIDE, generator=torch.manual_seed(1))
    state = AdapterState({(0, "q"): Factors(A, B)})
    done = aggregate("svd", [(1.0, state)], {0: 3}, FRESH).state[0, "q"]
    assert torch.count_nonzero(done.B[:, 1:]) == 0
    assert int(torch.linalg.matrix_rank(done.A)) == 3
    _close(done.product(), state[0, "q"].product())


@pytest.mark.parametrize("half", ["A", "B"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(half, value):
    bad = _state({0: 2, 1: 2}, 1)
    getattr(bad[1, "q"], half)[0, 0] = value
    with pytest.raises(AdapterError, match="not finite"):
        aggregate("svd", [(1.0, _state({0: 2, 1: 2}, 0)), (1.0, bad)], {0: 2, 1: 2}, FRESH)


def test_sets_over_other_layers_are_refused():
    state = _state({0: 2, 1: 2}, 0)
    with pytest.raises(AdapterError, match="they differ at block 1"):
        aggregate("svd", [(1.0, state), (1.0, state.within([0]))], {0: 2, 1: 2}, FRESH)


def test_unequal_ranks_are_refused_by_factors_with_the_way_out():
    found = [(1.0, _state({0: 2, 1: rank}, rank)) for rank in (4, 2)]
    with pytest.raises(AdapterError, match=r"block 1 comes with ranks 2, 4; .* zero-pad, .* or set lora"):
        aggregate("factors", found, {0: 2, 1: 4}, FRESH)


def _wide(key, members, rank, fresh):
    factors = members[0][1]
    return United(replace(factors, B=torch.cat([factors.B, factors.B])))


def _infinite(key, members, rank, fresh):
    factors = members[0][1]
    return United(replace(factors, A=factors.A / 0))


@pytest.fixture
def added():
    """Add a rule for one test."""
    yield lambda **facts: RULES.add("mine", Rule(**facts))
    RULES._things.pop("mine", None)


@pytest.mark.parametrize(
    ("unite", "fault"),
    [
        (lambda key, members, rank, fresh: members[99], "failed at block 0 q: IndexError: list index out"),
        (lambda key, members, rank, fresh: Factors(torch.ones(2, 3), torch.ones(2)), "failed at .* not fac"),
        (lambda key, members, rank, fresh: None, "returned NoneType instead of splitft.adapters.United"),
        (
            lambda key, members, rank, fresh: United(members),
            "returned list instead of .*Factors for",
        ),
        (_wide, r"returned factors of a layer \(14, 9\) instead of \(7, 9\)"),
        (_infinite, "returned numbers that are not finite for block 0 q"),
        (lambda key, members, rank, fresh: United(*[members[0][1]] * 2), "returned a folded part, although"),
        (
            lambda key, members, rank, fresh: United(Factors(*(x.double() for x in _pair(members)))),
            "returned factors of torch.float64 and torch.float64 instead of torch.float32",
        ),
        (lambda key, members, rank, fresh: United(members[0][1].select("A")), "returned factors of a layer"),
    ],
)
def test_a_rule_that_fails_or_returns_unusable_factors_is_named(added, unite, fault):
    added(unite=unite)
    with pytest.raises(AdapterError, match=rf"aggregation rule 'mine' {fault}"):
        aggregate("mine", [(1.0, _state({0: 2, 1: 2}, 0))], {0: 2, 1: 2}, FRESH)


def _pair(members):
    return members[0][1].A, members[0][1].B


def test_a_rule_of_a_plugin_is_fitted_to_the_ranks_of_the_next_round(added):
    """The first member's factors, at whatever rank they are."""
    added(unite=lambda key, members, rank, fresh: United(members[0][1]))
    state = _state({0: 2, 1: 4}, 0)
    done = aggregate("mine", [(1.0, state), (0.0, _state({0: 3, 1: 1}, 1))], {0: 3, 1: 2}, FRESH).state
    assert done.ranks() == {0: 3, 1: 2}
    assert torch.equal(done[0, "q"].product(), state[0, "q"].product())
    assert torch.equal(done[1, "q"].A, state[1, "q"].A[:2])


@pytest.mark.parametrize(
    "facts",
    [
        {"trains": "A"},  # B is 0 at first, so that nothing would be learnt
        {"up": "B"},
        {"trains": "B"},
        {"trains": "B", "up": "B", "down": "B"},
        {"down": "A"},
        {"down": "", "full_rank": True},
        {"up": "A", "down": "A"},
    ],
)
def test_facts_that_contradict_each_other_make_no_rule(facts):
    with pytest.raises(PluginError, match="cannot be run: trains is AB or B"):
        Rule(unite=print, **facts)


def test_a_round_that_nobody_finished_is_refused():
    with pytest.raises(AdapterError, match="no participant"):
        aggregate("svd", [], {0: 2, 1: 2}, FRESH)


@pytest.mark.parametrize("weights", [(0.0, 0.0), (2.0, -1.0), (1.0, float("nan")), (1.0, float("inf"))])
def test_weights_without_a_mean_are_refused(weights):
    state = _state({0: 2, 1: 2}, 0)
    with pytest.raises(AdapterError, match="have no mean"):
        aggregate("svd", [(weight, state) for weight in weights], {0: 2, 1: 2}, FRESH)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_client_of_weight_zero_counts_for_nothing(rule):
    ranks = {0: 2, 1: 2}
    state, other = _state(ranks, 0), _state(ranks, 1)
    done = aggregate(rule, [(3.0, state), (0.0, other)], ranks, FRESH)
    for key in KEYS:
        _close(done.product(key), state[key].product())
