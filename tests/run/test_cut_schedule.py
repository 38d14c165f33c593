"""Cuts that choose themselves in real runs, and the simulated clock that the rounds are charged to."""

from __future__ import annotations

import pytest

from laws.federations import federation, largest_relative_difference, write_text
from splitft.adapters import AdapterState
from splitft.errors import ModelError, ScheduleError
from splitft.protocol import RoundStart
from splitft.run.cut_schedule import CutSchedule
from splitft.schedule.simulated_search import round_simulator
from splitft.tracking.events import CutsChanged, RoundTimed, StepDone

SLOW = {
    "block_forward_ms_per_token": 5.0,
    "block_backward_ms_per_token": 5.0,
    "head_ms_per_token": 1.0,
    "memory_gb": 4.0,
}
QUICK = {**SLOW, "block_forward_ms_per_token": 0.05, "block_backward_ms_per_token": 0.05}
SERVER = {**SLOW, "block_forward_ms_per_token": 0.5, "block_backward_ms_per_token": 0.5, "memory_gb": 100.0}
TRAINING = {"rounds": 4, "steps": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


@pytest.fixture
def run(tiny_llama, text):
    def play(cuts="auto", clients=3, **schedule):
        schedule = {"links": "lan", "server": SERVER, **schedule}
        prepared = federation(
            tiny_llama, text, [1] * clients, training=TRAINING, clients={"cuts": cuts}, schedule=schedule
        )
        events = []
        trainer = prepared.trainer(prepared.simulation(), events.append)
        state = trainer.train(prepared.initial())
        return prepared, state, events

    return play


def of(events, kind):
    return [event for event in events if isinstance(event, kind)]


def test_makespan_gives_quick_clients_more_blocks_than_slow_ones(run):
    _, state, _ = run(controller="makespan", devices=[SLOW, QUICK, QUICK])
    slow, quick, _ = state.cuts.values()
    assert slow < quick


FAR = {"up_mbit_per_s": 5.0, "down_mbit_per_s": 5.0, "latency_ms": 500.0}


def test_quickest_leaves_the_whole_model_on_a_client_and_splits_another_in_the_same_rounds(run):
    """The quick machine is far away, the slow one is near; where blocks run changes no result."""
    fleet = {"devices": [QUICK, SLOW], "links": [FAR, "lan"]}
    prepared, mixed, events = run(clients=2, controller="quickest", **fleet)
    L = prepared.model.shape.blocks
    assert mixed.cuts["client-1"] == L
    assert mixed.cuts["client-2"] < L
    (first,) = of(events, CutsChanged)
    assert f"client-1: trains the whole model (cut {L}) and is not split" in first.reason
    sent = {event.client: event.traffic for event in of(events, StepDone)}
    assert not sent["client-1"].up
    assert sent["client-2"].up["hidden"] > 0
    _, split, before = run(clients=2, controller="makespan", **fleet)
    assert max(split.cuts.values()) < L
    assert of(events, RoundTimed)[0].seconds < of(before, RoundTimed)[0].seconds
    assert largest_relative_difference(mixed.adapters.tensors(), split.adapters.tensors()) < 1e-5


def test_a_client_that_becomes_slow_is_split_after_all_and_the_model_does_not_notice(run):
    change = [{"round": 2, "client": 2, "compute": 0.001}]
    fleet = {"devices": [SLOW, QUICK], "links": ["lan", FAR]}
    prepared, moved, events = run(clients=2, controller="quickest", changes=change, **fleet)
    L = prepared.model.shape.blocks
    first, second = of(events, CutsChanged)
    assert (first.cuts["client-2"], second.cuts["client-2"] < L) == (L, True)
    _, still, _ = run(clients=2, controller="makespan", **fleet)
    assert largest_relative_difference(moved.adapters.tensors(), still.adapters.tensors()) < 1e-5


def test_quickest_keeps_to_the_deepest_cut_that_is_given_and_others_reach_the_whole_model_by_it(run):
    fleet = {"devices": [QUICK, SLOW], "links": [FAR, "lan"]}
    _, state, _ = run(clients=2, controller="quickest", max_cut=3, **fleet)
    assert max(state.cuts.values()) <= 3
    prepared, state, _ = run(clients=2, controller="makespan", max_cut=4, **fleet)
    assert state.cuts["client-1"] == prepared.model.shape.blocks == 4


def test_where_no_cut_keeps_a_privacy_bound_the_whole_model_does(run):
    fleet = {"devices": QUICK, "max_recovery": 0.1, "recovery": AUDIT}
    _, state, _ = run(controller="quickest", **fleet)
    assert set(state.cuts.values()) == {4}
    with pytest.raises(ScheduleError, match=r"cut 3 gives 0\.20"):
        run(controller="quickest", max_cut=3, **fleet)


def test_by_time_a_quick_client_takes_more_steps_and_weighs_more_in_rounds_as_long(tiny_llama, text):
    def play(**training):
        prepared = federation(
            tiny_llama, text, [2, 2], training={**TRAINING, "rounds": 2, **training},
            schedule={"controller": "fixed", "devices": [SLOW, QUICK], "links": "lan", "server": QUICK},
        )  # fmt: skip
        events = []
        prepared.trainer(prepared.simulation(), events.append).train(prepared.initial())
        steps = [(event.round, event.client) for event in of(events, StepDone)]
        return {key: steps.count(key) for key in steps}, [one.seconds for one in of(events, RoundTimed)]

    usual, usual_s = play()
    steps, seconds = play(steps_by="time")
    assert set(usual.values()) == {2}
    assert all(steps[number, "client-1"] == 2 for number in (1, 2))
    assert all(2 < steps[number, "client-2"] <= 8 for number in (1, 2))
    assert seconds == pytest.approx(usual_s, rel=0.02)


def test_a_client_that_slows_down_is_relieved_in_the_next_round_and_the_model_does_not_notice(run):
    change = [{"round": 2, "client": 2, "compute": 0.001}]
    _, still, before = run(controller="makespan", devices=[SLOW, QUICK, QUICK])
    _, moved, events = run(controller="makespan", devices=[SLOW, QUICK, QUICK], changes=change)
    first, second = of(events, CutsChanged)
    assert (first.round, second.round) == (1, 3)
    assert second.cuts["client-2"] < first.cuts["client-2"]
    assert second.reason
    timed = of(events, RoundTimed)
    assert timed[1].seconds > of(before, RoundTimed)[1].seconds  # hit by the change
    assert timed[2].seconds < timed[1].seconds  # relieved
    assert largest_relative_difference(moved.adapters.tensors(), still.adapters.tensors()) < 1e-5


@pytest.mark.parametrize(
    "change", [{"link": 0.1}, {"compute": 0.1}], ids=["a link at a tenth of its rates", "a busy machine"]
)
def test_makespan_needs_one_round_to_know_of_a_change_and_none_to_act_on_it(run, change):
    """It shows in the round it begins; the cuts of the next are those of who always knew."""
    numbers = {
        "block_forward_ms_per_token": 0.2,
        "block_backward_ms_per_token": 0.2,
        "head_ms_per_token": 0.1,
    }
    machines = {
        "devices": {**SLOW, **numbers},
        "server": {**SERVER, "block_forward_ms_per_token": 0.5, "block_backward_ms_per_token": 0.5},
        "links": {"up_mbit_per_s": 2.0, "down_mbit_per_s": 2.0, "latency_ms": 1.0},
    }
    changes = [{"round": 2, "client": 2, **change}]
    prepared, _, events = run(controller="makespan", changes=changes, **machines)
    first, second = of(events, CutsChanged)
    assert (first.round, second.round) == (1, 3)
    assert list(first.cuts.values()) == [3, 3, 3]
    assert list(second.cuts.values()) == [3, 1, 3]
    pace = prepared.cut_schedule
    foretold = round_simulator(pace.fleet.costs, pace.fleet.at(2))
    assert foretold(second.cuts) <= foretold(first.cuts)
    timed = of(events, RoundTimed)
    assert timed[1].seconds > timed[0].seconds
    assert timed[2].seconds - timed[2].move_seconds == pytest.approx(foretold(second.cuts))
    _, _, known = run(controller="makespan", changes=[{**changes[0], "round": 1}], **machines)
    assert [change.cuts for change in of(known, CutsChanged)] == [second.cuts]


def test_a_move_to_a_deeper_cut_is_charged_with_the_weights_it_loads(run):
    change = [{"round": 2, "client": 1, "compute": 1000.0}]
    prepared, state, events = run(controller="makespan", devices=[SLOW, QUICK, QUICK], changes=change)
    first, second = of(events, CutsChanged)
    gained = second.cuts["client-1"] - first.cuts["client-1"]
    assert gained > 0
    job = prepared.cut_schedule.fleet.costs
    moved = next(event for event in of(events, RoundTimed) if event.round == second.round)
    assert moved.weight_bytes >= gained * job.sizes.block_parameters * 8  # float64
    assert moved.move_seconds > 0
    assert prepared.clients[0].segment.span.stop == state.cuts["client-1"]


def test_equal_seeds_give_equal_times_to_the_last_digit(run):
    def timed():
        _, _, events = run(controller="paper", devices=[SLOW, QUICK, QUICK])
        return [event.model_dump(exclude={"t"}) for event in of(events, RoundTimed)]

    assert timed() == timed()


def test_paper_moves_clients_by_their_held_out_loss(run):
    _, _, events = run(controller="paper", devices=QUICK)
    changes = of(events, CutsChanged)
    assert len(changes) > 1
    assert "better, so deeper" in changes[1].reason


def test_a_client_that_fits_at_no_cut_stops_the_run_before_it_trains(run):
    tiny = {**SLOW, "memory_gb": 1e-6}
    with pytest.raises(ScheduleError, match=r"'client-2' lacks .* of memory.*schedule\.misfit"):
        run(controller="makespan", devices=[SLOW, tiny, QUICK])


def test_or_it_is_left_out_and_the_others_train(run):
    tiny = {**SLOW, "memory_gb": 1e-6}
    prepared, state, _ = run(controller="makespan", devices=[SLOW, tiny, QUICK], misfit="leave-out")
    assert set(state.cuts) == {"client-1", "client-3"}
    assert "client-2" in prepared.cut_schedule.left_out[0]


def test_bounds_on_the_cut_are_kept(run):
    _, state, _ = run(controller="makespan", devices=QUICK, min_cut=2, max_cut=2)
    assert set(state.cuts.values()) == {2}


def test_a_fixed_run_that_would_not_fit_its_machines_is_warned_not_stopped(run):
    tiny = {**SLOW, "memory_gb": 1e-6}
    prepared, state, _ = run(cuts=[1, 2, 3], devices=tiny)
    assert list(state.cuts.values()) == [1, 2, 3]
    assert len(prepared.cut_schedule.misfits) == 3


def test_a_client_that_cannot_load_its_new_blocks_keeps_its_old_cut(tiny_llama, text, monkeypatch):
    prepared = federation(tiny_llama, text, [1, 1], training=TRAINING)
    client, other = prepared.clients
    adapters = prepared.initial().adapters
    client.start(RoundStart(round=1, cut=1))
    held = client.segment.parameter_count()

    def vanished(*arguments, **options):
        raise ModelError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(client.segment._frozen[2], "fill", vanished)  # the second of the blocks that are new
        with pytest.raises(ModelError):
            client.start(RoundStart(round=2, cut=3, adapters=adapters.within([1, 2])))
    assert client.plan.cut == 1
    assert client.segment.parameter_count() == held
    client.start(RoundStart(round=2, cut=1, adapters=AdapterState()))
    assert client.forward().hidden.shape[1] == prepared.model.shape.width
    other.start(RoundStart(round=2, cut=3, adapters=adapters.within([1, 2])))
    assert other.segment.span.stop == 3


AUDIT = {1: 0.99, 2: 0.6, 3: 0.2}


@pytest.mark.parametrize("controller", ["resources", "paper", "makespan"])
def test_cuts_that_choose_themselves_keep_the_privacy_bound_in_every_round(run, controller):
    _, _, events = run(controller=controller, devices=SLOW, max_recovery=0.7, recovery=AUDIT)
    assert all(cut >= 2 for change in of(events, CutsChanged) for cut in change.cuts.values())


def test_a_privacy_bound_that_cannot_be_kept_is_refused_before_training(run):
    with pytest.raises(ScheduleError, match=r"cut 3 gives 0\.20"):
        run(controller="makespan", devices=QUICK, max_recovery=0.1, recovery=AUDIT)
    with pytest.raises(ScheduleError, match=r"client-1 cut 1 \(0\.99 by the audit\)"):
        run(cuts=[1, 3, 3], max_recovery=0.3, recovery=AUDIT)
    with pytest.raises(ScheduleError, match="was not audited"):
        run(cuts=3, max_recovery=0.3)


def test_a_site_that_allows_no_shallow_cut_is_asked_for_none(run):
    prepared, _, _ = run(controller="makespan", devices=SLOW)
    floors = {"client-2": 3}
    _, cuts = CutSchedule.begin(prepared.config, prepared.cut_schedule.fleet, floors)
    assert cuts["client-2"] == 3
    fixed = prepared.config.model_copy(
        update={"schedule": prepared.config.schedule.model_copy(update={"controller": "fixed"}),
                "clients": prepared.config.clients.model_copy(update={"cuts": 2})}
    )  # fmt: skip
    with pytest.raises(ScheduleError, match="client-2 has cut 2, but its site takes part from cut 3"):
        CutSchedule.begin(fixed, prepared.cut_schedule.fleet, floors)


@pytest.fixture
def deployed(tiny_llama, text):
    """A schedule as a deployed run has it, its first cuts, and a function that reports a round's steps."""

    def make(controller):
        machines = {"devices": SLOW, "links": "lan", "server": {**SLOW, "memory_gb": 100.0}}
        prepared = federation(
            tiny_llama, text, [2] * 3, training={**TRAINING, "steps": 3},
            schedule={"controller": controller, **machines},
        )  # fmt: skip
        schedule, cuts = CutSchedule.begin(prepared.config, prepared.cut_schedule.fleet)

        def report(number, cuts, slower, stall_s=0.0):
            """Report steps that took so many times as long as predicted, the last one with a stall."""
            for client in schedule.problem(number, cuts).clients:
                if client.name not in slower:
                    continue
                predicted = {leg: s / 3 for leg, s in client.option(cuts[client.name]).seconds.items()}
                for step in range(3):
                    seconds = {
                        leg: predicted[leg] * slower[client.name] + (stall_s if step == 2 else 0.0)
                        for leg in ("client_forward", "head", "client_backward")
                    }
                    schedule.observe(
                        StepDone(
                            round=number, step=3 * number - 3 + step, client=client.name, loss=1.0, tokens=1,
                            examples=1, seconds=seconds,
                        )
                    )  # fmt: skip

        return schedule, cuts, report

    return make


LOSSES = dict.fromkeys(("client-1", "client-2", "client-3"), 2.0)
AS_PREDICTED = dict.fromkeys(LOSSES, 1.0)


@pytest.mark.parametrize("controller", ["makespan", "resources"])
def test_a_client_that_is_slower_than_its_profile_gets_a_shallower_cut_in_the_next_round(
    deployed, controller
):
    schedule, cuts, report = deployed(controller)
    report(1, cuts, {**AS_PREDICTED, "client-2": 20.0})
    after = schedule.choose(2, cuts, LOSSES).cuts
    assert after["client-2"] < cuts["client-2"]
    assert all(after[name] >= cuts[name] for name in ("client-1", "client-3"))
    # it is not in round 2, and is still known to be slow, at whatever cut it has
    report(2, after, {"client-1": 1.0, "client-3": 1.0})
    assert schedule.choose(3, after, LOSSES).cuts["client-2"] == after["client-2"]
    # as quick again as its profile
    report(3, after, AS_PREDICTED)
    assert schedule.choose(4, after, LOSSES).cuts["client-2"] > after["client-2"]


def test_steps_that_take_as_long_as_predicted_move_no_cut_and_neither_does_one_that_stalls(deployed):
    schedule, cuts, report = deployed("makespan")
    report(1, cuts, AS_PREDICTED, stall_s=100.0)
    assert schedule.choose(2, cuts, LOSSES).cuts == cuts
