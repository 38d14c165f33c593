"""Steps by time: more for who is done early, in a round that is hardly longer."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedule.cases import SERVER, client, costs
from splitft.schedule.clock import client_round, simulate_round
from splitft.schedule.step_counts import WAITED, steps_by_time
from splitft.specs.training import MOST_TIMES


def rounds_of(speeds, cuts):
    return [
        client_round(costs(), client(f"c{number}", speed), cut)
        for number, (speed, cut) in enumerate(zip(speeds, cuts, strict=True))
    ]


def round_s(rounds, steps):
    return simulate_round([replace(one, steps=steps[one.name]) for one in rounds], SERVER).round_s


@settings(max_examples=25)
@given(st.lists(st.tuples(st.floats(0.05, 20), st.integers(1, 6)), min_size=1, max_size=4))
def test_the_round_is_hardly_longer_and_nobody_takes_fewer_steps(drawn):
    rounds = rounds_of(*zip(*drawn, strict=True))
    steps = steps_by_time(rounds, SERVER)
    usual = {one.name: one.steps for one in rounds}
    assert round_s(rounds, steps) <= round_s(rounds, usual) * (1 + 1.001 * WAITED)
    assert all(usual[name] <= count <= MOST_TIMES * usual[name] for name, count in steps.items())


def test_a_client_that_is_done_early_takes_as_many_as_fit():
    """With the whole model neither needs the server: worked out by hand."""
    slow, quick = rounds_of([1.0, 2.0], [6, 6])
    assert steps_by_time([slow, quick], SERVER) == {"c0": slow.steps, "c1": 2 * slow.steps}


def test_alike_clients_take_equal_steps():
    rounds = rounds_of([1.0, 1.0, 1.0], [6, 6, 6])
    assert steps_by_time(rounds, SERVER) == pytest.approx({one.name: one.steps for one in rounds})
