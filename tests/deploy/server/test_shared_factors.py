"""Sites that train one copy of the server's factors, or have the whole model, train what a simulation trains.

Where results depend on the order in which steps arrive, a transport imposes the simulation's.
"""

from __future__ import annotations

import threading
import time

import pytest

from deploy.network import EVERYONE, HEAD_BYTES, SPEC, deployed
from deploy.server.test_federation import Faulty, Slow, difference
from laws.federations import federation, play, write_text
from splitft.protocol.frame import open_frame
from splitft.training.batching import in_random_order

CUTS = [1, 2, 3]
TRAINING = {"rounds": 2, "steps": 3}
FLEET = {"devices": ["laptop", "phone", "workstation"], "links": ["dsl", "lte", "lan"]}
KINDS = {"begins": "Activations", "completes": "HeadGradient"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


@pytest.fixture
def parties(tiny_llama, text):
    def make(mode, cuts=CUTS, **sections):
        sections = {"split": {"server_adapters": mode}, "training": TRAINING, "schedule": FLEET} | sections
        return federation(tiny_llama, text, cuts, **sections)

    return make


class Conductor:
    """Lets the messages of training steps through to the server one by one, in a given order."""

    def __init__(self, order):
        self._order, self._changed = list(order), threading.Condition()

    def of(self, site):
        return lambda transport: _Conducted(self, site, transport)

    def through(self, mark, ask):
        with self._changed:
            assert self._changed.wait_for(lambda: self._order[0] == mark, 20), (mark, self._order[:3])
        answer = ask()
        with self._changed:
            del self._order[0]
            self._changed.notify_all()
        return answer


class _Conducted:
    def __init__(self, conductor, site, transport):
        self._conductor, self._site, self._transport, self._known = conductor, site, transport, b""

    def ask(self, data, within_s):
        def ask():
            return self._transport.ask(data, within_s)

        frame = open_frame(data[HEAD_BYTES:])
        if frame.kind not in KINDS.values() or not frame.fields.get("training", True) or data == self._known:
            return ask()
        answer = self._conductor.through((self._site, frame.kind), ask)
        self._known = data
        return answer


def order_in_turn(prepared):
    """The order that a simulation draws, as messages."""
    training, seed = prepared.config.training, prepared.ranks.seed
    split = [one.name for one in prepared.clients if not one.whole]
    return [
        (name, kind)
        for number in range(1, training.rounds + 1)
        for step in range(training.steps)
        for [name] in in_random_order(split, [seed, number, step])
        for kind in KINDS.values()
    ]


def order_by_arrival(prepared):
    """The order of the simulated clock, as messages."""
    training = prepared.config.training
    cuts = {one.name: one.plan.cut for one in prepared.clients if not one.whole}
    return [
        (mark.client, KINDS[mark.event])
        for number in range(1, training.rounds + 1)
        for mark in prepared.cut_schedule.arrival_order(number, cuts, training.steps)
    ]


ORDERS = {"shared-in-turn": order_in_turn, "shared-by-arrival": order_by_arrival}
MODES = ["shared", "shared-in-turn", "shared-by-arrival"]


def run(prepared, around=lambda site, transport: transport, spec=SPEC):
    """Deploy in the order that the simulation has; `around` wraps each site's transport."""
    split = prepared.config.split
    conductor = None
    if split.server_adapters in ORDERS:
        order = ORDERS[split.server_adapters](prepared)
        if split.labels == "server":  # one message a step
            order = [mark for mark in order if mark[1] == "Activations"]
        conductor = Conductor(order)

    def wrapped(site, transport):
        return around(site, conductor.of(site)(transport) if conductor else transport)

    transports = {name: (lambda transport, name=name: wrapped(name, transport)) for name in EVERYONE}
    return deployed(prepared, transports, spec)


def assert_equal(outcome, simulated):
    assert outcome.error is None
    assert not outcome.of("SiteChanged")
    assert difference(outcome.state, simulated) < 1e-6
    assert outcome.state.losses == pytest.approx(simulated.losses, rel=1e-6)


@pytest.mark.parametrize(
    ("mode", "labels"),
    [(mode, "client") for mode in MODES] + [("shared", "server"), ("shared-in-turn", "server")],
)
def test_sites_that_share_the_servers_factors_learn_what_the_simulation_does(parties, mode, labels):
    def uneven(site, transport):
        return Slow(transport, 0.1) if site == "client-2" else transport

    split = {"split": {"server_adapters": mode, "labels": labels}}
    assert_equal(run(parties(mode, **split), uneven), play(parties(mode, **split))[0])


@pytest.mark.fault(
    "requests and answers are lost, requests repeated, {mode}", "the adapters equal the simulation's"
)
@pytest.mark.parametrize("mode", MODES)
def test_lost_and_repeated_messages_change_nothing(parties, mode):
    made = []

    def faulty(site, transport):
        made.append(Faulty(transport, len(made)))
        return made[-1]

    assert_equal(run(parties(mode), faulty), play(parties(mode))[0])
    assert sum(one.faults for one in made) > 5


def test_parts_of_a_common_step_in_flight_change_nothing(parties):
    parts = {"training": {**TRAINING, "micro_batches": 2, "in_flight": 2}}
    assert_equal(run(parties("shared", **parts)), play(parties("shared"))[0])


# --- the whole model at a site ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "cuts"),
    [("per-client", [4, 4, 4]), ("per-client", [4, 1, 2]), *((mode, [1, 4, 2]) for mode in MODES)],
)
def test_sites_with_the_whole_model_and_others_learn_what_the_simulation_does(parties, mode, cuts):
    prepared = parties(mode, cuts)
    outcome = run(prepared)
    simulated, events = play(parties(mode, cuts))
    assert_equal(outcome, simulated)
    whole = EVERYONE[cuts.index(4)]
    steps = [(one.step, one.tokens, one.examples) for one in outcome.of("StepDone") if one.client == whole]
    assert steps == [
        (one.step, one.tokens, one.examples)
        for one in events
        if one.event == "StepDone" and one.client == whole
    ]
    assert [one.loss for one in outcome.of("StepDone") if one.client == whole] == pytest.approx(
        [one.loss for one in events if one.event == "StepDone" and one.client == whole], rel=1e-6
    )


def test_a_slow_site_with_the_whole_model_is_stopped_and_its_steps_count(parties):
    prepared = parties("per-client", [4, 1, 2], training={"rounds": 2, "steps": 8})
    slow = next(client for client in prepared.clients if client.whole)
    step = slow.step_alone
    slow.step_alone = lambda: time.sleep(0.8) or step()
    outcome = deployed(prepared, spec=SPEC.model_copy(update={"slack": 1.0, "patience_s": 2.5}))
    assert outcome.error is None
    assert set(outcome.states(slow.name)) == {"late"}, outcome.reasons(slow.name)
    assert outcome.participants() == [EVERYONE, EVERYONE]
    steps = [event.step for event in outcome.of("StepDone") if event.client == slow.name]
    assert steps == list(range(len(steps)))
    assert slow.steps == len(steps) < 16  # the last, which was underway, is reported too
