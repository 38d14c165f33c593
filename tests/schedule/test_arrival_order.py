"""The order of steps at the server: read off a timeline by hand, and what holds for every timeline."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from schedule.cases import SERVER
from splitft.schedule.arrival_order import arrival_order, one_at_a_time, waves
from splitft.schedule.clock import ClientRound, simulate_round
from splitft.schedule.cost import Leg

BY_ARRIVAL = replace(SERVER, adapters="shared-by-arrival", group_overhead_s=0.0)
LEGS = ("client_forward", "up_hidden", "server_forward", "head", "server_backward", "client_backward")


def _order(clients, server=BY_ARRIVAL):
    marks = arrival_order(simulate_round(clients, server), clients)
    return " ".join(f"{mark.client}{'+' if mark.event == 'begins' else '-'}" for mark in marks)


def _client(name, seconds, steps=1, **more):
    legs = tuple(Leg(leg, float(time), tokens=4) for leg, time in zip(LEGS, seconds, strict=True))
    return ClientRound(name, (), legs, steps, (), **more)


def test_a_quick_client_completes_steps_while_a_slow_ones_gradient_is_underway():
    quick = _client("q", (1, 0, 1, 1, 1, 1), steps=3)  # at the server from 1, 3, then 6, 8, then 11, 13
    slow = _client("s", (2, 0, 1, 6.5, 1, 1))  # from 2, then 9.5
    assert _order([quick, slow]) == "q+ s+ q- q+ q- s- q+ q-"


def test_clients_of_a_group_begin_before_one_of_them_completes():
    whole_step = (Leg("client_forward", 1.0), Leg("server_step", 2.0, tokens=4), Leg("client_backward", 1.0))
    clients = [ClientRound(name, (), whole_step, 1, ()) for name in "ab"]
    assert _order(clients, replace(BY_ARRIVAL, group_tokens=8)) == "a+ b+ a- b-"
    assert _order(clients) == "a+ a- b+ b-"


def test_a_step_in_parts_begins_with_its_first_and_completes_with_its_last():
    one = _client("a", (1, 0, 1, 1, 1, 1), steps=2, micro_batches=3, in_flight=2)
    assert _order([one]) == "a+ a- a+ a-"


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 8), min_size=6, max_size=6), st.integers(1, 3), st.integers(1, 3)),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([0.0, 8.0, 100.0]),
)
def test_every_step_begins_once_and_completes_before_its_clients_next(drawn, group_tokens):
    clients = [
        _client(f"c{i}", seconds, steps, micro_batches=parts)
        for i, (seconds, steps, parts) in enumerate(drawn)
    ]
    server = replace(BY_ARRIVAL, group_tokens=group_tokens)
    marks = arrival_order(simulate_round(clients, server), clients)
    for client in clients:
        events = [mark.event for mark in marks if mark.client == client.name]
        assert events == ["begins", "completes"] * client.steps
    assert [name for _, names in waves(marks) for name in names] == [mark.client for mark in marks]
    assert all(len(set(names)) == len(names) for _, names in waves(marks))


def test_one_at_a_time_no_step_begins_before_the_last_has_completed():
    events = [mark.event for mark in one_at_a_time(1, {"a": 1, "b": 2}, 3)]
    assert events == ["begins", "completes"] * 6
