"""Spans, cuts and ranks by block: laws over all small cases."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitft.errors import GeometryError
from splitft.geometry import Plan, Span, check_cut, ranks_by_block

SPANS = st.tuples(st.integers(0, 12), st.integers(0, 12)).map(lambda ends: Span(min(ends), max(ends)))
CUTS = st.integers(1, 12).flatmap(lambda blocks: st.tuples(st.integers(1, blocks), st.just(blocks)))


@given(SPANS)
def test_a_span_is_the_range_of_its_blocks(span):
    assert list(span) == list(range(span.start, span.stop))
    assert len(span) == len(list(span))
    assert {block for block in range(-2, 15) if block in span} == set(span)
    assert "0" not in span


@given(SPANS, SPANS)
def test_a_span_without_another_is_the_difference_of_their_blocks(a, b):
    assert a.minus(b) == tuple(sorted(set(a) - set(b)))


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2)])
def test_ends_that_make_no_range_are_refused(start, stop):
    with pytest.raises(GeometryError, match=rf"\[{start}, {stop}\) is not a range"):
        Span(start, stop)


@given(CUTS)
def test_client_and_server_hold_every_block_once(cut_and_blocks):
    cut, blocks = cut_and_blocks
    plan = Plan(cut, blocks)
    assert [*plan.client, *plan.server] == list(range(blocks))
    assert len(plan.client) == cut


@given(st.integers(-3, 16), st.integers(1, 12), st.booleans())
def test_a_cut_leaves_the_client_a_block_and_the_server_one_if_it_must(cut, blocks, whole_allowed):
    fits = cut >= 1 and (cut < blocks or (whole_allowed and cut == blocks))
    if fits:
        assert check_cut(cut, blocks, whole_allowed) == cut
        return
    if blocks == 1 and not whole_allowed:
        with pytest.raises(GeometryError, match="a model of 1 block cannot be split"):
            check_cut(cut, blocks, whole_allowed)
        return
    who = "client" if cut < 1 else "server"
    with pytest.raises(GeometryError, match=f"cut {cut} leaves the {who} no blocks: the model has {blocks}"):
        check_cut(cut, blocks, whole_allowed)


def test_a_plan_that_does_not_fit_is_refused():
    with pytest.raises(GeometryError, match="choose 1 to 4"):
        Plan(5, 4)


def test_the_picture_of_the_module():
    assert ranks_by_block(3, 8, 16, 8) == (16, 16, 8, 8, 16, 16, 16, 16)


SIDES = st.lists(st.sampled_from(["client", "server"]), unique=True).map(tuple)


@given(CUTS, st.integers(0, 14), SIDES)
def test_a_block_has_the_lower_rank_if_it_is_near_the_cut_on_a_named_side(cut_and_blocks, span, sides):
    cut, blocks = cut_and_blocks
    ranks = ranks_by_block(cut, blocks, 16, 4, span, sides)
    for block in range(blocks):
        side, distance = ("client", cut - block) if block < cut else ("server", block - cut + 1)
        near = cut < blocks and side in sides and distance <= span
        assert ranks[block] == (4 if near else 16)


@given(CUTS)
def test_without_a_rank_at_the_cut_all_blocks_are_equal(cut_and_blocks):
    cut, blocks = cut_and_blocks
    assert ranks_by_block(cut, blocks, 16) == (16,) * blocks


def test_ranks_of_a_cut_that_does_not_fit_are_refused():
    with pytest.raises(GeometryError, match="cut 0"):
        ranks_by_block(0, 4, 16, 8)
