"""The simulated clock: repeatable, honest about every place, and no faster than work allows."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedule.cases import SERVER, client, costs
from splitft.errors import ScheduleError
from splitft.schedule.clock import ClientRound, client_round, simulate_round
from splitft.schedule.cost import Leg, round_seconds
from splitft.schedule.memory import client_memory
from splitft.schedule.profile import ServerProfile
from splitft.schedule.round_timeline import WAIT

STEP = ("client_forward", "up_hidden", "server_forward", "down_hidden", "head", "server_backward")
"""Some legs of each place; whole seconds keep sums exact."""

SECONDS = st.integers(0, 9).map(float)


@st.composite
def rounds(draw, most_micro_batches=3):
    clients = [
        ClientRound(
            f"c{number}",
            draw(st.just(()) | st.tuples(SECONDS.map(lambda s: Leg("adapters_down", s)))),
            tuple(Leg(name, draw(SECONDS), tokens=draw(st.integers(1, 4))) for name in STEP),
            draw(st.integers(1, 3)),
            draw(st.just(()) | st.tuples(SECONDS.map(lambda s: Leg("adapters_up", s)))),
            draw(st.integers(1, most_micro_batches)),
        )
        for number in range(draw(st.integers(1, 4)))
    ]
    overhead_s, limit = float(draw(st.integers(0, 3))), draw(st.sampled_from([0.0, 5.0, 1e9]))
    return clients, ServerProfile(SERVER.device, overhead_s, limit)


def _finished_s(timeline, name):
    return max((one.end_s for one in timeline.of(name)), default=0.0)


def _least_step_s(legs, micro_batches):
    """Seconds that no schedule beats: the chain of one micro-batch, or all work of the busiest place."""
    by_place = {}
    for leg in legs:
        by_place[leg.place] = by_place.get(leg.place, 0.0) + leg.seconds
    return max(sum(by_place.values()), micro_batches * max(by_place.values()))


@given(rounds())
def test_the_same_round_twice_is_the_same_to_the_last_digit(case):
    clients, server = case
    assert simulate_round(clients, server) == simulate_round(list(clients), server)


@given(rounds())
def test_no_place_does_two_things_at_once(case):
    clients, server = case
    timeline = simulate_round(clients, server)
    for who in (*timeline.clients, "server"):
        for place in ("client", "up", "down", *(["server"] if who == "server" else [])):
            work = [one for one in timeline.of(who, place) if one.leg != WAIT]
            assert all(earlier.end_s <= later.start_s for earlier, later in pairwise(work))


@given(rounds())
def test_a_round_is_no_shorter_than_any_client_alone_and_than_all_work_of_the_server(case):
    clients, server = case
    timeline = simulate_round(clients, server)
    for one in clients:
        once_s = sum(leg.seconds for leg in (*one.before, *one.after))
        visits_s = 2 * server.group_overhead_s
        assert timeline.round_s >= once_s + one.steps * _least_step_s(one.step, one.micro_batches)
        if one.micro_batches == 1:
            assert _finished_s(timeline, one.name) >= one.own_s + one.steps * visits_s
    work_s = sum(
        one.steps * one.micro_batches * leg.seconds
        for one in clients
        for leg in one.step
        if leg.place == "server"
    )
    groups = timeline.of("server")
    assert timeline.busy_s("server") == work_s + server.group_overhead_s * len(groups)
    assert timeline.round_s >= timeline.busy_s("server")


@given(rounds())
def test_idle_and_busy_make_up_the_round(case):
    clients, server = case
    timeline = simulate_round(clients, server)
    assert timeline.round_s == max(_finished_s(timeline, one.name) for one in clients)
    for who in (*timeline.clients, "server"):
        assert timeline.busy_s(who) + timeline.idle_s(who) == timeline.round_s
        assert timeline.idle_s(who) >= 0


@given(rounds())
def test_all_work_is_done_and_nothing_else(case):
    clients, server = case
    timeline = simulate_round(clients, server)
    for one in clients:
        done = [bar.leg for bar in timeline.of(one.name) if bar.leg != WAIT]
        expected = [leg.name for leg in (*one.before, *one.after)]
        expected += [leg.name for leg in one.step] * (one.steps * one.micro_batches)
        assert sorted(done) == sorted(expected)


@given(rounds(most_micro_batches=1))
def test_a_client_is_always_somewhere_so_its_legs_add_up_to_its_end(case):
    clients, server = case
    timeline = simulate_round(clients, server)
    for one in clients:
        bars = timeline.of(one.name)
        assert sum(timeline.seconds_by_leg(one.name).values()) == _finished_s(timeline, one.name)
        assert all(earlier.end_s == later.start_s for earlier, later in pairwise(bars))


@given(rounds())
def test_groups_hold_one_leg_and_fit_unless_a_client_alone_does_not(case):
    clients, server = case
    tokens = {(one.name, leg.name): leg.tokens for one in clients for leg in one.step}
    for group in simulate_round(clients, server).of("server"):
        total = sum(tokens[member, group.leg] for member in group.members)
        assert len(group.members) == 1 or total <= server.group_tokens


def test_two_clients_that_arrive_together_share_a_group_and_its_overhead():
    step = (Leg("client_forward", 1.0), Leg("server_step", 2.0, tokens=8), Leg("client_backward", 1.0))
    clients = [ClientRound(name, (), step, 1, ()) for name in "ab"]
    apart = simulate_round(clients, ServerProfile(SERVER.device, 3.0, 8))
    together = simulate_round(clients, ServerProfile(SERVER.device, 3.0, 16))
    assert [group.members for group in apart.of("server")] == [("a",), ("b",)]
    assert [group.members for group in together.of("server")] == [("a", "b")]
    assert (apart.round_s, together.round_s) == (1 + 5 + 5 + 1, 1 + 7 + 1)
    assert apart.seconds_by_leg("b") == {
        "client_forward": 1,
        WAIT: 5,
        "server_step": 5,
        "client_backward": 1,
    }
    assert apart.idle_s("a") == 12 - 2
    assert apart.idle_s("server") == 2


def test_a_group_has_the_fixed_time_of_blocks_once_that_of_its_shallowest_client():
    deep, shallow = (Leg("server_step", 2.0 + fixed, tokens=8, shared_s=fixed) for fixed in (0.5, 1.5))
    clients = [ClientRound("a", (), (deep,), 1, ()), ClientRound("b", (), (shallow,), 1, ())]
    together = simulate_round(clients, ServerProfile(SERVER.device, 0.0, 16))
    apart = simulate_round(clients, ServerProfile(SERVER.device, 0.0, 8))
    assert (together.round_s, apart.round_s) == (2 + 2 + 1.5, 2.5 + 3.5)
    assert shallow.scaled(2.0) == replace(shallow, seconds=7.0, shared_s=3.0)


def test_micro_batches_in_flight_hide_the_link_and_reach_the_bound():
    step = (Leg("client_forward", 2.0), Leg("up_hidden", 2.0), Leg("server_step", 2.0, tokens=1))
    one = ClientRound("a", (), step, 1, ())
    assert (
        simulate_round([replace(one, micro_batches=4)], ServerProfile(SERVER.device)).round_s == 2 + 2 + 4 * 2
    )
    assert one.own_s == _least_step_s(step, 1) == 6
    assert _least_step_s(step, 4) == 8


def test_the_next_step_waits_for_all_micro_batches_of_this_one():
    step = (Leg("client_forward", 1.0), Leg("up_hidden", 1.0))
    timeline = simulate_round([ClientRound("a", (), step, 2, (), micro_batches=2)], SERVER)
    starts = [one.start_s for one in timeline.of("a", "client") if one.leg != WAIT]
    assert starts == [0, 1, 3, 4]


@pytest.mark.parametrize("labels", ["client", "server"])
@pytest.mark.parametrize("cut", [1, 3, 6])
def test_a_client_alone_takes_what_its_costs_predict(labels, cut):
    our_costs = costs(labels=labels)
    timeline = simulate_round([client_round(our_costs, client(), cut)], our_costs.server)
    predicted = round_seconds(our_costs, client(), cut)
    assert timeline.seconds_by_leg("a") == pytest.approx(predicted)
    assert timeline.round_s == pytest.approx(sum(predicted.values()))


@settings(max_examples=30)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(1, 6))
def test_a_round_lasts_at_least_as_long_as_the_slowest_clients_own(speeds, cut):
    members = [client(f"c{number}", speed) for number, speed in enumerate(speeds)]
    timeline = simulate_round([client_round(costs(), one, cut) for one in members], costs().server)
    slowest = max(sum(round_seconds(costs(), one, cut).values()) for one in members)
    assert timeline.round_s >= slowest * (1 - 1e-12)


def test_what_cannot_be_simulated_is_refused():
    one = ClientRound("a", (), (Leg("head", 1.0),), 1, ())
    for bad, match in (
        ([one, one], "'a': the name is taken"),
        ([replace(one, name="server")], "the name is taken"),
        ([replace(one, steps=0)], "0 steps"),
        ([replace(one, step=())], "of 0 legs"),
        ([replace(one, step=(Leg("head", float("nan")),))], "head takes nan s"),
    ):
        with pytest.raises(ScheduleError, match=match):
            simulate_round(bad, SERVER)
    with pytest.raises(ScheduleError, match="'b' took no part"):
        simulate_round([one], SERVER).of("b")


def test_only_so_many_micro_batches_of_a_step_are_underway_as_are_allowed():
    step = (
        Leg("client_forward", 1),
        Leg("up_hidden", 1),
        Leg("server_forward", 1),
        Leg("client_backward", 1),
    )
    seconds = [
        simulate_round(
            [ClientRound("a", (), step, 1, (), micro_batches=4, in_flight=count)],
            ServerProfile(SERVER.device),
        ).round_s
        for count in (1, 2, 4, None)
    ]
    assert seconds[0] == 4 * 4  # one after the other
    assert seconds[0] > seconds[1] >= seconds[2] == seconds[3]


def test_a_job_in_micro_batches_hides_the_link_and_keeps_the_activations_of_those_in_flight():
    one, plain = client(), costs()
    divided = costs(micro_batches=2, in_flight=2)
    assert divided.parts(one.workload) == 2
    assert divided.share_in_flight(one.workload) == 1
    in_turn = costs(micro_batches=2, in_flight=1)
    for each, share in ((plain, 1), (divided, 1), (in_turn, in_turn.share_in_flight(one.workload))):
        kept = client_memory(each, one, 2).activations
        assert kept == pytest.approx(share * client_memory(plain, one, 2).activations)
    assert in_turn.share_in_flight(one.workload) < 1
    rounds = [client_round(each, one, 2) for each in (in_turn, divided)]
    apart, together = (simulate_round([each], plain.server).round_s for each in rounds)
    assert together < apart
