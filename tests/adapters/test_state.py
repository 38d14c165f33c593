"""Laws of adapter sets: names and back, parts and unions, and initial numbers that no cut changes."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitft.adapters import AdapterState, Factors, initial_state
from splitft.adapters.state import fresh_rows
from splitft.errors import AdapterError
from splitft.geometry import Span

TARGETS = st.sampled_from(["mlp.up", "self_attn.q_proj", "self_attn.v_proj", "A", "x.B.y"])
KEYS = st.sets(st.tuples(st.integers(0, 120), TARGETS), max_size=8)


@st.composite
def states(draw, keys=KEYS) -> AdapterState:
    found = {}
    for number, key in enumerate(draw(keys)):
        rank, wide, out = draw(st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)))
        generator = torch.manual_seed(number)
        found[key] = Factors(
            torch.randn(rank, wide, generator=generator), torch.randn(out, rank, generator=generator)
        )
    return AdapterState(found)


def _same(a: AdapterState, b: AdapterState) -> bool:
    return list(a) == list(b) and all(
        torch.equal(a[key].A, b[key].A) and torch.equal(a[key].B, b[key].B) for key in a
    )


@given(states())
def test_a_state_survives_its_flat_names(state):
    flat = state.tensors()
    assert len(flat) == 2 * len(state)
    assert _same(AdapterState.from_tensors(flat), state)
    assert _same(AdapterState.from_tensors(dict(reversed(flat.items()))), state)


@given(states())
def test_layers_come_in_order_of_block_and_target_however_they_were_given(state):
    assert list(state) == sorted(state)
    assert _same(AdapterState(dict(reversed(list(state.items())))), state)


@given(states(), st.integers(0, 121))
def test_a_cut_divides_a_state_in_two_whose_union_it_is(state, cut):
    client, server = state.within(Span(0, cut)), state.within(Span(cut, 121))
    assert all(block < cut for block, _ in client)
    assert len(client) + len(server) == len(state)
    assert _same(client.union(server), state)
    assert _same(server.union(client), state)


@given(states())
def test_halves_that_overlap_are_refused(state):
    if not len(state):
        assert _same(state.union(state), state)
        return
    with pytest.raises(AdapterError, match=rf"two adapters for block {next(iter(state))[0]}: .* overlap"):
        state.union(state)


@given(states(), states())
def test_updating_takes_the_others_where_both_have_factors(old, new):
    updated = old.updated(new)
    assert updated.keys() == old.keys() | new.keys()
    for key in updated:
        assert updated[key] is (new[key] if key in new else old[key])


@given(states())
def test_the_rank_of_a_block_is_the_largest_of_its_targets(state):
    for block, rank in state.ranks().items():
        assert rank == max(factors.rank for (own, _), factors in state.items() if own == block)


def test_a_product_is_b_times_a():
    factors = Factors(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0], [5.0]]))
    assert factors.rank == 1
    assert factors.product().tolist() == [[3, 6], [4, 8], [5, 10]]


@pytest.mark.parametrize(("A", "B"), [((2, 3), (3, 3)), ((2,), (3, 2)), ((2, 3), (1, 3, 2))])
def test_shapes_that_make_no_product_are_refused(A, B):
    with pytest.raises(AdapterError, match=re.escape(f"A {A} and B {B} are not factors of one product")):
        Factors(torch.zeros(A), torch.zeros(B))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "A",
        "7.A",
        "7..A",
        "x.q.A",
        "-1.q.A",
        "7.q.C",
        "7.q.a",
        "²3.q.A",
        "07.q.A",
        "7.q",
        "9" * 5000 + ".q.A",
    ],
)
def test_names_that_are_no_factors_are_refused(name):
    with pytest.raises(AdapterError, match="is not the name of an adapter factor"):
        AdapterState.from_tensors({name: torch.zeros(1, 1)})


def test_one_factor_without_the_other_is_refused():
    with pytest.raises(AdapterError, match="block 7 q: only factor B is given"):
        AdapterState.from_tensors({"7.q.B": torch.zeros(1, 1)})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_seen(value):
    state = initial_state({(0, "q"): (3, 3), (1, "q"): (3, 3)}, {0: 2, 1: 2}, 0, torch.float32)
    assert state.all_finite()
    state[1, "q"].B[2, 1] = value
    assert not state.all_finite()


SIZES = {(block, target): (8, 6) for block in range(4) for target in ("q", "v")}


def test_initial_factors_depend_on_the_layer_and_the_seed_alone():
    """So every party makes its own, and no cut, order or company changes them."""
    ranks = dict.fromkeys(range(4), 3)
    whole = initial_state(SIZES, ranks, 5, torch.float32)
    for key, size in SIZES.items():
        assert _same(initial_state({key: size}, ranks, 5, torch.float32), AdapterState({key: whole[key]}))
    firsts = {tuple(factors.A.flatten().tolist()) for factors in whole.values()}
    others = initial_state(SIZES, ranks, 6, torch.float32)
    assert len(firsts | {tuple(factors.A.flatten().tolist()) for factors in others.values()}) == 16


def test_initial_factors_are_the_same_numbers_in_every_type():
    ranks = dict.fromkeys(range(4), 3)
    narrow, wide = (initial_state(SIZES, ranks, 5, dtype) for dtype in (torch.float32, torch.float64))
    assert all(torch.equal(narrow[key].A.double(), wide[key].A) for key in SIZES)


def test_drawing_initial_factors_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    fresh_rows((0, "q"), 4, 8, seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_regrown_rows_differ_by_round():
    assert not torch.equal(fresh_rows((0, "q"), 2, 8, 1, salt=3), fresh_rows((0, "q"), 2, 8, 1, salt=4))
