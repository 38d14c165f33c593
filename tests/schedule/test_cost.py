"""Costs by hand-computed examples, and what must rise or fall with the cut."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedule.cases import SERVER, SIZES, client, costs
from splitft.errors import GeometryError
from splitft.schedule.codec_cost import WireBytes
from splitft.schedule.cost import (
    adapter_legs,
    move_seconds,
    round_bytes,
    round_seconds,
    step_legs,
)
from splitft.schedule.problem import options
from splitft.specs import LoraSpec

CUTS = range(1, SIZES.blocks + 1)


def test_a_step_leg_by_leg():
    legs = {leg.name: leg for leg in step_legs(costs(), client(), cut=2)}
    assert {name: leg.seconds for name, leg in legs.items()} == {
        "client_forward": 2 * 16 * 1.0,  # blocks x padded tokens x seconds
        "up_hidden": 0.25 + 12 * 10 * 2 / 100,  # latency + real tokens x D x bytes / rate
        "server_forward": 4 * 16 * 0.5,
        "down_hidden": 0.25 + 8 * 10 * 2 / 200,
        "head": 8 * 0.5,
        "up_gradient": 0.25 + 8 * 10 * 2 / 100,
        "server_backward": 4 * 16 * 1.0,
        "down_gradient": 0.25 + 12 * 10 * 2 / 200,
        "client_backward": 2 * 16 * 2.0,
    }
    assert {name: leg.nbytes for name, leg in legs.items() if leg.nbytes} == {
        "up_hidden": 240,
        "down_hidden": 160,
        "up_gradient": 160,
        "down_gradient": 240,
    }


@pytest.mark.parametrize("labels", ["client", "server"])
def test_blocks_that_are_computed_again_take_their_forward_pass_twice(labels):
    kept, again = (
        {leg.name: leg for leg in step_legs(costs(labels=labels, checkpoint_blocks=one), client(), cut=2)}
        for one in (False, True)
    )
    at_server = "server_backward" if labels == "client" else "server_step"
    assert again["client_backward"].seconds - kept["client_backward"].seconds == 2 * 16 * 1.0
    assert again[at_server].seconds - kept[at_server].seconds == 4 * 16 * 0.5
    assert {name for name in kept if again[name] != kept[name]} == {"client_backward", at_server}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("labels", ["client", "server"])
def test_the_fixed_time_of_blocks_is_theirs_on_both_sides_and_a_groups_on_the_server(labels, again):
    fixed_s, passes = 7.0, {"forward": 1, "backward": 2 if again else 1}
    slow = replace(SERVER, device=replace(SERVER.device, block_overhead_s=fixed_s))
    free = costs(labels=labels, checkpoint_blocks=again)
    device = replace(client().device, block_overhead_s=fixed_s)
    without = {leg.name: leg for leg in step_legs(free, client(), cut=2)}
    with_it = {leg.name: leg for leg in step_legs(replace(free, server=slow), client(device=device), cut=2)}
    added = {name: leg.seconds - without[name].seconds for name, leg in with_it.items()}
    shared = {name: leg.shared_s for name, leg in with_it.items() if leg.shared_s}
    on_server = {f"server_{way}": 4 * times * fixed_s for way, times in passes.items()}
    if labels == "server":
        on_server = {"server_step": sum(on_server.values())}
    assert shared == on_server
    of_client = {f"client_{way}": 2 * times * fixed_s for way, times in passes.items()}
    assert {name: more for name, more in added.items() if more} == on_server | of_client


def test_with_labels_on_the_server_there_is_one_visit_and_the_text_travels():
    legs = {leg.name: leg for leg in step_legs(costs(labels="server"), client(), cut=2)}
    assert list(legs) == ["client_forward", "up_hidden", "server_step", "down_gradient", "client_backward"]
    assert legs["up_hidden"].nbytes == 240 + 8 * 8
    assert legs["server_step"].seconds == 4 * 16 * 0.5 + 8 * 0.25 + 4 * 16 * 1.0


@pytest.mark.parametrize("labels", ["client", "server"])
def test_the_whole_model_on_the_client_sends_adapters_only(labels):
    assert set(round_bytes(costs(labels=labels), client(), 6)) == {"adapters_down", "adapters_up"}
    assert [leg.name for leg in step_legs(costs(labels=labels), client(), 6)] == [
        "client_forward",
        "head",
        "client_backward",
    ]


def test_adapters_carry_the_lowered_rank_at_the_cut():
    down, up = adapter_legs(costs(), client(), cut=3)
    assert down.nbytes == up.nbytes == (4 + 4 + 2) * 20 * 4


def test_codecs_divide_the_bytes_of_their_role():
    full = round_bytes(costs(wire=WireBytes(4, 4, 4)), client(), 2)
    coded = round_bytes(costs(wire=WireBytes(1, 2, 4)), client(), 2)
    assert {leg: full[leg] / coded[leg] for leg in full} == {
        "adapters_down": 1,
        "up_hidden": 4,
        "down_hidden": 4,
        "up_gradient": 2,
        "down_gradient": 2,
        "adapters_up": 1,
    }


@pytest.mark.parametrize("labels", ["client", "server"])
@pytest.mark.parametrize("cut", CUTS)
def test_a_round_is_its_steps_and_the_exchange_of_adapters(labels, cut):
    our_costs, one = costs(labels=labels), client()
    legs = step_legs(our_costs, one, cut)
    visits = sum(leg.place == "server" for leg in legs)
    step_s = sum(leg.seconds for leg in legs) + visits * SERVER.group_overhead_s
    exchange_s = sum(leg.seconds for leg in adapter_legs(our_costs, one, cut))
    assert sum(round_seconds(our_costs, one, cut).values()) == pytest.approx(5 * step_s + exchange_s)


@given(
    labels=st.sampled_from(["client", "server"]),
    rank_at_cut=st.sampled_from([None, 1, 4]),
    cut_span=st.integers(0, 3),
    speed=st.floats(0.01, 100),
)
def test_deeper_cuts_cost_the_client_more_and_the_server_less(labels, rank_at_cut, cut_span, speed):
    lora = LoraSpec(rank=4, rank_at_cut=rank_at_cut, cut_span=cut_span)
    prices = options(costs(labels=labels, lora=lora), client(speed=speed), current=1)
    assert [price.cut for price in prices] == list(CUTS)
    for shallow, deep in pairwise(prices):
        assert deep.compute_s > shallow.compute_s
        assert deep.client_bytes > shallow.client_bytes
        assert deep.server_s < shallow.server_s
        assert deep.server_bytes < shallow.server_bytes
    assert (prices[-1].server_s, prices[-1].server_bytes) == (0, 0)


@pytest.mark.parametrize("cut", range(1, 6))
def test_what_a_split_sends_in_a_step_does_not_depend_on_the_cut(cut):
    sent = round_bytes(costs(), client(), cut)
    assert sum(value for leg, value in sent.items() if "adapters" not in leg) == 5 * 800


def test_moving_deeper_fetches_weights_and_adapters_and_shallower_hands_over_moments():
    one = client()
    adapters = (4 + 2) * 20 * 4  # blocks 2 and 3 at cut 4
    assert move_seconds(costs(), one, 2, 2) == 0
    assert move_seconds(costs(), one, 2, 4) == 0.25 + (2 * 1000 * 2 + adapters) / 200
    kept = move_seconds(costs(), one, 2, 4, moments_kept=True)
    assert kept == 0.25 + (2 * 1000 * 2 + 3 * adapters) / 200
    assert move_seconds(costs(), one, 4, 2) == 0.25
    assert move_seconds(costs(), one, 4, 2, moments_kept=True) == 0.25 + 2 * (2 + 4) * 20 * 4 / 100


def test_cuts_that_do_not_exist_are_refused():
    for cut in (0, 7):
        with pytest.raises(GeometryError, match="choose 1 to 6"):
            step_legs(costs(), client(), cut)
