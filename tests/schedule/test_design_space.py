"""The controller of the whole design space: not slower on the clock than any method that is a point of it."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedule.cases import DEVICE, LINK, SERVER, SIZES, WORK, client, costs
from splitft.errors import ScheduleError
from splitft.schedule.clock import client_round, simulate_round
from splitft.schedule.controllers import choose
from splitft.schedule.design_space import RunMode, best_mode
from splitft.schedule.memory import client_memory
from splitft.schedule.problem import feasible, problem_of
from splitft.schedule.profile import Link
from splitft.schedule.simulated_search import round_simulator
from splitft.specs.server_stepping import SERVER_STEPPING, ServerStepping
from splitft.specs.training import ServerAdapters

L = SIZES.blocks
WAYS = list(SERVER_STEPPING)
PLAIN = RunMode()

speeds = st.floats(0.05, 20)
rates = st.floats(1.0, 1e4)


@st.composite
def members(draw):
    """Clients of all kinds of machines and links; some lack the memory for the whole model."""
    found = []
    for number in range(draw(st.integers(1, 4))):
        link = Link("drawn", draw(rates), draw(rates), draw(st.sampled_from([0.0, 0.25, 5.0])))
        one = client(f"c{number}", draw(speeds), link=link)
        work = replace(
            WORK,
            tokens=draw(st.integers(8, 16)),
            padded_length=draw(st.integers(8, 12)),
            steps=draw(st.integers(1, 6)),
        )
        one = replace(one, workload=work)
        if draw(st.booleans()):
            fits = client_memory(shared(), one, draw(st.integers(1, L - 1))).total
            one = replace(one, device=replace(one.device, memory_bytes=fits))
        found.append(one)
    return found


def shared(mode=PLAIN, **changes):
    server = replace(SERVER, group_tokens=40.0)
    return mode.applied(costs(**{"server": server, **changes}))


def posed(found, mode=PLAIN, max_cut=L, cuts=None, **changes):
    """Return the problem of these clients, with cuts up to `max_cut`, on the clock of a mode."""
    priced = shared(mode, **changes)
    problem = problem_of(priced, found, cuts or [1] * len(found), rounds_left=10)
    return replace(
        problem,
        simulate=round_simulator(priced, found),
        clients=tuple(
            replace(
                one, max_cut=max_cut, options=tuple(replace(option, move_s=0.0) for option in one.options)
            )
            for one in problem.clients
        ),
    )


def on_the_clock(found, cuts, mode=PLAIN, **changes):
    priced = shared(mode, **changes)
    return simulate_round([client_round(priced, one, cuts[one.name]) for one in found], priced.server).round_s


def peers(found, **changes):
    """Yield each method of the field that these clients can run: its name, way of stepping, and cuts."""
    allowed = feasible(posed(found, **changes))
    for cut in sorted(set.intersection(*(set(one.cuts) for one in allowed.values()))):
        cuts = dict.fromkeys(allowed, cut)
        if cut == L:
            yield "fedlora", "per-client", cuts
            continue
        yield "splitft-fixed" if cut == 2 else "splitfed-v1", "per-client", cuts
        yield "splitfed-v2", "shared-in-turn", cuts
        yield "splitlora", "shared", cuts
    yield "makespan", "per-client", choose("makespan", posed(found, max_cut=L - 1, **changes)).cuts


@settings(max_examples=30)
@given(members(), st.sampled_from(["client", "server"]))
def test_the_choice_is_not_slower_than_any_method_on_the_clock(found, labels):
    with pytest.MonkeyPatch.context() as patch:
        # as few as a large model has for its size, and makespan has no more
        patch.setattr("splitft.schedule.simulated_search.RUNGS", 2)
        chosen = best_mode(WAYS, [(1, 1)], lambda mode: posed(found, mode, labels=labels))
        others = list(peers(found, labels=labels))
    assert chosen.seconds == on_the_clock(found, chosen.cuts, chosen.mode, labels=labels)
    for method, way, cuts in others:
        theirs = on_the_clock(found, cuts, RunMode(way, 1, 1), labels=labels)
        assert chosen.seconds <= theirs * (1 + 1e-9), (method, cuts, chosen)


@settings(max_examples=15)
@given(members())
def test_from_round_to_round_too_no_cuts_of_one_way_are_quicker(found):
    chosen = choose("quickest", posed(found)).cuts
    for method, way, cuts in peers(found):
        if way == "per-client":
            assert on_the_clock(found, chosen) <= on_the_clock(found, cuts) * (1 + 1e-9), method


@settings(max_examples=40)
@given(members(), st.sampled_from(WAYS), st.sampled_from([(1, 1), (2, 1), (2, 2)]), st.data())
def test_no_round_is_shorter_than_its_bound(found, way, division, data):
    mode = RunMode(way, *(division if way != "shared-in-turn" else (1, 1)))
    cuts = {one.name: data.draw(st.integers(1, L)) for one in found}
    labels = data.draw(st.sampled_from(["client", "server"]))
    our_costs = shared(mode, labels=labels)
    fixed_s = data.draw(st.sampled_from([0.0, 3.0]))  # of a block, which a group has once
    device = replace(our_costs.server.device, block_overhead_s=fixed_s)
    server = replace(our_costs.server, device=device, group_tokens=data.draw(st.sampled_from([0.0, 1e9])))
    clock = round_simulator(replace(our_costs, server=server), found)
    assert clock.at_least(cuts) <= clock(cuts)


def test_a_client_alone_meets_its_bound():
    """It would be no bound worth having if it were far below."""
    clock = round_simulator(shared(), [client("a")])
    assert clock.at_least({"a": 2}) == pytest.approx(clock({"a": 2}))


def fast_and_slow():
    """A machine that holds the whole model, on a slow link, and one that holds a part, on a fast link."""
    slow_link, fast_link = (
        Link("slow", 1.0, 1.0, 5.0),
        replace(LINK, up_bytes_per_s=1e6, down_bytes_per_s=1e6),
    )
    able = client("able", 20.0, link=slow_link)
    small = client("small", 0.2, link=fast_link)
    fits = client_memory(shared(), small, 2).total
    return [able, replace(small, device=replace(small.device, memory_bytes=fits))]


def test_one_client_holds_the_whole_model_and_another_is_split_and_the_reason_says_so():
    decision = choose("quickest", posed(fast_and_slow()))
    assert decision.cuts["able"] == L
    assert decision.cuts["small"] <= 2
    assert f"able: trains the whole model (cut {L}) and is not split" in decision.reason
    assert "small" not in decision.reason
    bounded = choose("quickest", posed(fast_and_slow(), max_cut=L - 1))
    assert bounded.cuts["able"] < L
    assert "whole model" not in bounded.reason


def test_where_all_hold_the_whole_model_and_links_are_slow_nobody_is_split():
    found = [client(name, 20.0, link=Link("slow", 1.0, 1.0, 5.0)) for name in "ab"]
    decision = choose("quickest", posed(found))
    assert decision.cuts == {"a": L, "b": L}
    assert "every client trains the whole model" in decision.reason


def test_ways_that_tie_give_one_copy_for_each_client():
    assert best_mode(WAYS, [(1, 1)], lambda mode: posed([client("a")], mode)).mode.adapters == "per-client"


def test_measured_progress_changes_the_choice(monkeypatch):
    found = [client(name, 5.0) for name in "abc"]
    choose_way = lambda: best_mode(WAYS, [(1, 1)], lambda mode: posed(found, mode, max_cut=2))  # noqa: E731
    assert choose_way().mode.adapters == "per-client"
    better = {**SERVER_STEPPING, "shared-in-turn": ServerStepping(5.0, "a test")}
    monkeypatch.setattr("splitft.schedule.design_space.SERVER_STEPPING", better)
    chosen = choose_way()
    assert chosen.mode.adapters == "shared-in-turn"
    assert chosen.seconds == on_the_clock(found, chosen.cuts, chosen.mode) / 5.0


def test_every_way_of_stepping_has_its_progress_and_the_source_of_it():
    assert set(SERVER_STEPPING) == set(get_args(ServerAdapters))
    assert all(one.progress > 0 and one.source for one in SERVER_STEPPING.values())


def test_micro_batches_are_taken_where_they_save_time():
    """With a slow link and a slow machine both work at once only on different parts of a step."""
    found = [
        client(
            "a", 1.0, link=Link("slow", 2.0, 2.0, 0.0), workload=replace(WORK, sequences=4, padded_length=4)
        )
    ]
    divisions = [(1, 1), (2, 2), (4, 4)]
    chosen = best_mode(["per-client"], divisions, lambda mode: posed(found, mode, max_cut=3))
    assert chosen.mode.micro_batches > 1
    assert chosen.seconds < on_the_clock(found, chosen.cuts, RunMode("per-client", 1, 1))
    far = [client("a", 1.0, link=Link("far", 1e9, 1e9, 100.0))]  # every message costs its latency
    chosen = best_mode(["per-client"], [(1, 1), (2, 1)], lambda mode: posed(far, mode, max_cut=3))
    assert chosen.mode.micro_batches == 1


def test_a_server_without_memory_in_every_way_says_what_it_lacks():
    server = replace(SERVER, device=replace(DEVICE, memory_bytes=1.0))
    with pytest.raises(ScheduleError, match="the server lacks memory"):
        best_mode(WAYS, [(1, 1)], lambda mode: posed([client("a")], mode, max_cut=2, server=server))
