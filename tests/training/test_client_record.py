"""What belongs to a block goes where the block goes, and comes back with it."""

from __future__ import annotations

import torch

from splitft.adapters import AdapterState, Factors
from splitft.geometry import Span
from splitft.training.client_record import ClientStates

MOMENTS = {f"{block}.q_proj.A.exp_avg": torch.full((2,), float(block)) for block in range(2, 6)}


def _state(value: float) -> AdapterState:
    return AdapterState(
        {(block, "q_proj"): Factors(torch.ones(2, 3), torch.full((3, 2), value)) for block in range(2, 6)}
    )


def test_moments_leave_with_their_blocks_when_the_client_has_moved_and_come_back_as_they_were():
    states = ClientStates(per_client=True)
    states.moments["a"] = dict(MOMENTS)
    gone = states.moments_of("a", Span(2, 4))
    assert set(gone) == {name for name in MOMENTS if name[0] in "23"}
    assert states.moments["a"].keys() == MOMENTS.keys()  # it may still be lost on the way
    states.move("a", Span(2, 4), {}, AdapterState())
    assert not gone.keys() & states.moments["a"].keys()
    states.move("a", (), gone, AdapterState())
    assert states.moments["a"].keys() == MOMENTS.keys()
    assert all(torch.equal(states.moments["a"][name], MOMENTS[name]) for name in MOMENTS)


def test_shared_moments_take_nothing_of_one_client():
    states = ClientStates(per_client=False)
    states.move("a", (), dict(MOMENTS), AdapterState())
    assert not states.moments


def test_own_factors_leave_in_the_place_of_the_global_ones_and_come_back():
    states = ClientStates(per_client=True)
    states.own["a"] = _state(7.0).select("B")
    gone = states.personal("a", _state(1.0).within(Span(2, 4)))
    states.move("a", Span(2, 4), {}, AdapterState())
    assert all(torch.equal(factors.B, torch.full((3, 2), 7.0)) for factors in gone.values())
    assert set(states.own["a"].ranks()) == {4, 5}
    states.move("a", (), {}, gone.select("B"))
    assert all(bool((one.B == 7).all()) for one in states.personal("a", _state(1.0)).values())
