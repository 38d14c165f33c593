"""What belongs to a block goes where the block goes, and comes back with it."""

from __future__ import annotations

import torch

from splitft.adapters import AdapterState, Factors
from splitft.geometry import Span
from splitft.training.kept import ClientState

MOMENTS = {f"{block}.q_proj.A.exp_avg": torch.full((2,), float(block)) for block in range(2, 6)}


def _state(value: float) -> AdapterState:
    return AdapterState(
        {(block, "q_proj"): Factors(torch.ones(2, 3), torch.full((3, 2), value)) for block in range(2, 6)}
    )


def test_moments_leave_with_their_blocks_when_the_client_has_moved_and_come_back_as_they_were():
    kept = ClientState(per_client=True)
    kept.moments["a"] = dict(MOMENTS)
    gone = kept.moments_of("a", Span(2, 4))
    assert set(gone) == {name for name in MOMENTS if name[0] in "23"}
    assert kept.moments["a"].keys() == MOMENTS.keys()  # it may still be lost on the way
    kept.moved("a", Span(2, 4), {}, AdapterState())
    assert not gone.keys() & kept.moments["a"].keys()
    kept.moved("a", (), gone, AdapterState())
    assert kept.moments["a"].keys() == MOMENTS.keys()
    assert all(torch.equal(kept.moments["a"][name], MOMENTS[name]) for name in MOMENTS)


def test_shared_moments_take_nothing_of_one_client():
    kept = ClientState(per_client=False)
    kept.moved("a", (), dict(MOMENTS), AdapterState())
    assert not kept.moments


def test_own_factors_leave_in_the_place_of_the_global_ones_and_come_back():
    kept = ClientState(per_client=True)
    kept.own["a"] = _state(7.0).only("B")
    gone = kept.personal("a", _state(1.0).within(Span(2, 4)))
    kept.moved("a", Span(2, 4), {}, AdapterState())
    assert all(torch.equal(factors.B, torch.full((3, 2), 7.0)) for factors in gone.values())
    assert set(kept.own["a"].ranks()) == {4, 5}
    kept.moved("a", (), {}, gone.only("B"))
    assert all(bool((one.B == 7).all()) for one in kept.personal("a", _state(1.0)).values())
