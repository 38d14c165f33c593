"""The server's queue: common batches wait for all clients, and turns are kept to their end."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedule.cases import SERVER
from splitft.errors import ScheduleError
from splitft.schedule.clock import ClientRound, simulate_round
from splitft.schedule.cost import Leg
from splitft.schedule.round_timeline import WAIT

SHARED, IN_TURN = replace(SERVER, adapters="shared"), replace(SERVER, adapters="shared-in-turn")
LEGS = ("client_forward", "up_hidden", "server_forward", "head", "server_backward", "client_backward")


@st.composite
def rounds(draw):
    seconds = st.integers(0, 8).map(float)
    return [
        ClientRound(
            f"c{i}", (), tuple(Leg(name, draw(seconds)) for name in LEGS), draw(st.integers(1, 3)), ()
        )
        for i in range(draw(st.integers(1, 4)))
    ]


@given(rounds())
def test_shared_factors_take_the_batches_of_all_who_still_have_steps_together(clients):
    timeline = simulate_round(clients, SHARED)
    for leg in ("server_forward", "server_backward"):
        groups = [sorted(one.members) for one in timeline.of("server") if one.leg == leg]
        longest = max(client.steps for client in clients)
        assert groups == [[c.name for c in clients if c.steps > step] for step in range(longest)]


@given(rounds())
def test_in_turn_a_client_keeps_the_server_from_its_first_visit_of_a_step_to_its_last(clients):
    visits = [(one.members, one.leg) for one in simulate_round(clients, IN_TURN).of("server")]
    assert len(visits) == 2 * sum(client.steps for client in clients)
    for members, legs in groupby(visits, key=lambda visit: visit[0]):
        assert len(members) == 1
        names = [leg for _, leg in legs]
        assert names == ["server_forward", "server_backward"] * (len(names) // 2)


@given(rounds(), st.sampled_from([SHARED, IN_TURN]))
def test_every_client_does_all_of_its_work_and_waits_for_the_rest(clients, server):
    timeline = simulate_round(clients, server)
    for client in clients:
        by_leg = timeline.seconds_by_leg(client.name)
        finished_s = max(one.end_s for one in timeline.of(client.name))
        assert sum(by_leg.values()) == pytest.approx(finished_s)
        for leg in client.step:
            if leg.place != "server":
                assert by_leg.get(leg.name, 0.0) == pytest.approx(client.steps * leg.seconds)


def test_a_common_batch_starts_when_the_slowest_client_is_there():
    step = (Leg("client_forward", 1.0), Leg("server_step", 2.0), Leg("client_backward", 1.0))
    slow = (Leg("client_forward", 10.0), *step[1:])
    clients = [ClientRound("quick", (), step, 1, ()), ClientRound("slow", (), slow, 1, ())]
    timeline = simulate_round(clients, SHARED)
    assert [(one.members, one.start_s, one.end_s) for one in timeline.of("server")] == [
        (("quick", "slow"), 10, 10 + 3 + 4)
    ]
    assert timeline.seconds_by_leg("quick")[WAIT] == 9


def test_shared_factors_need_equal_numbers_of_micro_batches():
    step = (Leg("server_step", 2.0),)
    clients = [ClientRound("a", (), step, 1, ()), ClientRound("b", (), step, 1, (), micro_batches=2)]
    with pytest.raises(ScheduleError, match="equal numbers of micro-batches"):
        simulate_round(clients, SHARED)
