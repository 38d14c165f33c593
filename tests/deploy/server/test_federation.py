"""A deployed run on threads equals its simulation, whatever the transport or a site does."""

from __future__ import annotations

import random
import threading
import time

import pytest

from deploy.lines import BY_ROUND, CutUntil, Mended, Mending, moving
from deploy.network import EVERYONE, SPEC, KilledError, deployed, kind_of
from laws.federations import Losing, federation, largest_relative_difference, play, write_text
from splitft.errors import ModelError, PausedError, TransportError
from splitft.geometry import Span

TRAINING = {"rounds": 2, "steps": 4}
CUTS = [1, 2, 3]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


@pytest.fixture
def parties(tiny_llama, text):
    def make(**training):
        return federation(tiny_llama, text, CUTS, training={**TRAINING, **training})

    return make


@pytest.fixture(scope="module")
def simulated(tiny_llama, text):
    return play(federation(tiny_llama, text, CUTS, training=TRAINING))[0]


def difference(one, other) -> float:
    return largest_relative_difference(one.adapters.tensors(), other.adapters.tensors())


class Faulty:
    """Loses requests and answers, and repeats requests, at random."""

    def __init__(self, transport, seed):
        self._transport, self._random = transport, random.Random(seed)
        self.faults = 0

    def ask(self, data, within_s):
        chance = self._random.random()
        if chance < 0.1:
            self.faults += 1
            raise TransportError("the request was lost")
        answer = self._transport.ask(data, within_s)
        if chance < 0.2:
            self.faults += 1
            raise TransportError("the answer was lost")
        if chance < 0.3:
            self.faults += 1
            assert self._transport.ask(data, within_s) == answer
        return answer


class Dying:
    """Is gone before it sends its n-th message of a kind, and sends nothing any more."""

    def __init__(self, transport, kind, nth):
        self._transport, self._kind, self._left = transport, kind, nth

    def ask(self, data, within_s):
        self._left -= kind_of(data) == self._kind
        if self._left <= 0:
            raise KilledError("killed")
        return self._transport.ask(data, within_s)


class Cut:
    """Its line is cut once, for some seconds, before its n-th message of a kind."""

    def __init__(self, transport, kind, nth, seconds):
        self._transport, self._kind, self._left, self._seconds = transport, kind, nth, seconds
        self._until = 0.0

    def ask(self, data, within_s):
        before = self._left
        self._left -= kind_of(data) == self._kind
        if before > 0 >= self._left:
            self._until = time.monotonic() + self._seconds
        if time.monotonic() < self._until:
            raise TransportError("the network is cut")
        return self._transport.ask(data, within_s)


class Slow:
    """Takes its time for every message with tensors."""

    def __init__(self, transport, seconds):
        self._transport, self._seconds = transport, seconds

    def ask(self, data, within_s):
        if len(data) > 2000:
            time.sleep(self._seconds)
        return self._transport.ask(data, within_s)


def test_a_federation_on_threads_equals_its_simulation(parties, simulated):
    outcome = deployed(parties())
    assert outcome.error is None
    assert not outcome.of("SiteChanged")
    assert difference(outcome.state, simulated) < 1e-6
    assert outcome.state.losses == pytest.approx(simulated.losses, rel=1e-6)


def test_magnitudes_travel_as_in_the_simulation(tiny_llama, text):
    sections = {"lora": {"method": "dora"}, "training": {"rounds": 2, "steps": 2}}
    alone, _ = play(federation(tiny_llama, text, CUTS, **sections))
    outcome = deployed(federation(tiny_llama, text, CUTS, **sections))
    assert outcome.error is None
    assert any(name.endswith(".M") for name in alone.adapters.tensors())
    found = outcome.state.adapters.tensors()
    assert largest_relative_difference(found, alone.adapters.tensors()) < 1e-9


def test_dropout_clipping_and_accuracy_are_those_of_the_simulation(tiny_llama, text):
    training = {"rounds": 2, "steps": 2, "clip": 0.05, "micro_batches": 2}
    sections = {"lora": {"dropout": 0.3}, "training": training}
    alone, events = play(federation(tiny_llama, text, CUTS, **sections))
    outcome = deployed(federation(tiny_llama, text, CUTS, **sections))
    assert outcome.error is None
    assert difference(outcome.state, alone) < 1e-6
    told = [one.accuracy_by_client for one in events if one.event == "Evaluated"]
    assert [one.accuracy_by_client for one in outcome.of("Evaluated")] == told
    assert all(len(one) == len(CUTS) for one in told)


@pytest.mark.parametrize("rule", ["zero-pad", "svd", "stack", "exact", "ffa"])
def test_every_rule_that_shares_all_it_trains_learns_what_it_learns_in_simulation(tiny_llama, text, rule):
    sections = {
        "lora": {"rank_at_cut": 2, "client_ranks": [4, 2, 3] if rule == "zero-pad" else None},
        "training": {"rounds": 3, "steps": 2},
        "aggregate": {"rule": rule},
    }
    alone, _ = play(federation(tiny_llama, text, CUTS, **sections))
    outcome = deployed(federation(tiny_llama, text, CUTS, **sections))
    assert outcome.error is None
    assert difference(outcome.state, alone) < 1e-6
    folded, alone_folded = (one.folded.tensors() for one in (outcome.state, alone))
    assert folded.keys() == alone_folded.keys()
    assert bool(folded) == (rule in ("stack", "exact"))
    assert outcome.state.losses == pytest.approx(alone.losses, rel=1e-6)


def test_what_rounding_left_out_of_an_upload_is_made_good_as_in_simulation(tiny_llama, text):
    sections = {"training": {"rounds": 3, "steps": 2}, "wire": {"adapter": "int8"}}
    alone, _ = play(federation(tiny_llama, text, CUTS, **sections))
    outcome = deployed(federation(tiny_llama, text, CUTS, **sections))
    assert outcome.error is None
    assert difference(outcome.state, alone) < 1e-6


@pytest.mark.fault(
    "10 % of requests and 10 % of answers are lost, 10 % repeated", "the adapters equal the simulation's"
)
def test_lost_and_repeated_messages_change_nothing(parties, simulated):
    made = []

    def faulty(transport):
        made.append(Faulty(transport, len(made)))
        return made[-1]

    outcome = deployed(parties(), dict.fromkeys(EVERYONE, faulty))
    assert outcome.error is None
    assert sum(one.faults for one in made) > 20
    assert difference(outcome.state, simulated) < 1e-6
    assert [event.step for event in outcome.of("StepDone") if event.client == "client-1"] == list(range(8))


@pytest.mark.parametrize(
    ("kind", "nth"),
    [("RoundReady", 1), ("Activations", 1), ("HeadGradient", 3), ("AdapterUpload", 1), ("AdapterUpload", 2)],
)
@pytest.mark.fault("a site dies at message {nth} of kind {kind}", "the round goes on without it")
def test_who_dies_is_left_out_and_the_others_go_on(parties, kind, nth):
    spec = SPEC.model_copy(update={"silence_s": 1.5})
    outcome = deployed(parties(), {"client-2": lambda transport: Dying(transport, kind, nth)}, spec)
    assert outcome.error is None
    assert outcome.states("client-2") == ["lost"]
    assert outcome.participants()[-1] == ("client-1", "client-3")
    assert outcome.state.round == 2
    assert outcome.state.adapters.all_finite()


@pytest.mark.fault("a site dies within a round", "the others learn what they learn without it (1e-6)")
def test_who_dies_changes_nothing_of_what_the_others_learn(tiny_llama, text):
    training = {"rounds": 1, "steps": 4}
    spec = SPEC.model_copy(update={"silence_s": 1.5})
    outcome = deployed(
        federation(tiny_llama, text, CUTS, training=training),
        {"client-2": lambda transport: Dying(transport, "HeadGradient", 3)},
        spec,
    )
    prepared = federation(tiny_llama, text, CUTS, training=training)
    prepared = type(prepared)(**{
        **prepared.__dict__, "clients": tuple(c for c in prepared.clients if c.name != "client-2"),
    })  # fmt: skip
    without, _ = play(prepared, lambda number, cuts: {n: k for n, k in cuts.items() if n != "client-2"})
    assert difference(outcome.state, without) < 1e-6


@pytest.mark.parametrize("rule", ["factors", "stack", "exact"])
@pytest.mark.fault(
    "a site is cut off for longer than silence_s, rule {rule}",
    "it is told where the run is, and back in the next round",
)
def test_whose_line_was_cut_is_told_where_the_run_is_and_takes_part_again(tiny_llama, text, rule):
    """Its loss on its own text is that of a client which is given the whole state from a checkpoint."""
    spec = SPEC.model_copy(update={"silence_s": 1.0})
    sections = {"training": {"rounds": 5, "steps": 4}, "aggregate": {"rule": rule}}

    def cut(transport):
        return Cut(transport, "HeadGradient", 3, 2.5)

    slow = {name: (lambda transport: Slow(transport, 0.1)) for name in ("client-1", "client-3")}
    outcome = deployed(federation(tiny_llama, text, CUTS, **sections), {"client-2": cut, **slow}, spec)
    assert outcome.error is None
    assert outcome.states("client-2") == ["lost", "back"], outcome.reasons("client-2")
    assert outcome.participants()[0] == ("client-1", "client-3")
    assert outcome.participants()[-1] == EVERYONE
    state, fresh = outcome.state, federation(tiny_llama, text, CUTS, **sections)
    fresh.server.place(state.cuts)
    fresh.server.install(state.adapters, state.folded)
    for client, own in zip(fresh.clients, CUTS, strict=True):
        span = Span(0, own)
        client.restore(own, state.adapters.within(span), 0, {}, state.folded.within(span))
    losses = {name: one.loss / one.tokens for name, one in fresh.simulation().evaluate().items()}
    assert state.losses == pytest.approx(losses, rel=1e-6)


@pytest.mark.fault("a site is cut off for less than silence_s", "no step is lost or repeated")
def test_a_line_that_is_cut_for_less_than_the_silence_allowed_costs_no_step(parties, simulated):
    outcome = deployed(parties(), {"client-2": lambda transport: Cut(transport, "HeadGradient", 3, 2.0)})
    assert outcome.error is None
    assert not outcome.of("SiteChanged")
    assert difference(outcome.state, simulated) < 1e-6


@pytest.mark.fault("a site is far slower than the others", "it is stopped; the steps that it finished count")
def test_the_finished_steps_of_a_slow_site_count(parties):
    spec = SPEC.model_copy(update={"slack": 1.0, "patience_s": 1.0})
    outcome = deployed(parties(steps=12), {"client-2": lambda transport: Slow(transport, 0.2)}, spec)
    assert outcome.error is None
    assert outcome.states("client-2") == ["late", "late"]
    assert outcome.participants() == [EVERYONE, EVERYONE]
    steps = [event.round for event in outcome.of("StepDone") if event.client == "client-2"]
    assert 0 < steps.count(1) < 12
    assert [e.step for e in outcome.of("StepDone") if e.client == "client-2"] == list(range(len(steps)))


@pytest.mark.fault("too few sites are left", "the run pauses and keeps its last finished round")
def test_with_too_few_sites_left_the_run_pauses(parties):
    spec = SPEC.model_copy(update={"silence_s": 1.5, "min_clients": 3})
    outcome = deployed(parties(), {"client-2": lambda transport: Dying(transport, "HeadGradient", 3)}, spec)
    assert isinstance(outcome.error, PausedError)
    assert outcome.participants() == []


# --- several micro-batches of a client in flight ---------------------------------------------------

PARTS = {"micro_batches": 3, "in_flight": 2, "batch_size": 3}


class Counting:
    """Counts how many steps' messages are in flight; each takes its time."""

    def __init__(self, transport, counts):
        self._transport, self._counts, self._underway = transport, counts, 0

    def ask(self, data, within_s):
        if kind_of(data) not in ("Activations", "HeadGradient"):
            return self._transport.ask(data, within_s)
        self._underway += 1
        self._counts.append(self._underway)
        try:
            time.sleep(0.01)
            return self._transport.ask(data, within_s)
        finally:
            self._underway -= 1


@pytest.mark.parametrize("in_flight", [1, 2])
def test_so_many_micro_batches_are_underway_at_once_and_nothing_changes(parties, simulated, in_flight):
    counts = []
    outcome = deployed(
        parties(**PARTS | {"in_flight": in_flight}),
        {"client-1": lambda transport: Counting(transport, counts)},
    )
    assert outcome.error is None
    assert not outcome.of("SiteChanged")
    assert difference(outcome.state, simulated) < 1e-6
    assert max(counts) == in_flight
    assert [event.step for event in outcome.of("StepDone") if event.client == "client-1"] == list(range(8))


@pytest.mark.fault(
    "messages of several micro-batches in flight are lost and repeated", "the adapters equal the simulation's"
)
def test_lost_and_repeated_messages_of_several_micro_batches_change_nothing(parties, simulated):
    transports = {
        name: (lambda transport, seed=seed: Faulty(transport, seed)) for seed, name in enumerate(EVERYONE)
    }
    outcome = deployed(parties(**PARTS), transports)
    assert outcome.error is None
    assert difference(outcome.state, simulated) < 1e-6


@pytest.mark.fault("a site is stopped in the middle of a divided step", "its whole steps count")
def test_a_site_that_is_stopped_in_the_middle_of_a_divided_step_keeps_its_whole_steps(parties):
    spec = SPEC.model_copy(update={"slack": 1.0, "patience_s": 1.0})
    outcome = deployed(parties(steps=12, **PARTS), {"client-2": lambda transport: Slow(transport, 0.1)}, spec)
    assert outcome.error is None
    assert outcome.states("client-2") == ["late", "late"]
    assert outcome.participants() == [EVERYONE, EVERYONE]
    steps = [event.step for event in outcome.of("StepDone") if event.client == "client-2"]
    assert 0 < len(steps) < 24
    assert steps == list(range(len(steps)))


# --- lost on the way to a new cut -------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["client-1", "client-2"])  # to a deeper cut, to a shallower one
@pytest.mark.fault(
    "{lost} is cut off as it moves to another cut",
    "it keeps its old cut with its factors and optimizer state",
)
def test_whose_line_is_cut_when_it_has_moved_comes_back_at_its_old_cut_with_all_it_had(
    lost, tiny_llama, text, tmp_path
):
    """What is trained is what a simulation trains in which it was merely absent from that round."""
    sections = {"training": {"rounds": 4, "steps": 3, "optimizer_state": "keep"}}
    spec = SPEC.model_copy(update={"silence_s": 1.0})
    mended = Mended()
    transports = {
        lost: lambda transport: CutUntil(transport, "RoundReady", 2, mended),
        "client-3": lambda transport: Mending(transport, "AdapterUpload", 2, mended),
    }
    prepared = federation(tiny_llama, text, BY_ROUND[0], **sections)
    outcome = deployed(prepared, transports, spec, controller=moving, kept=tmp_path)
    assert outcome.error is None
    assert outcome.states(lost) == ["lost", "back"], outcome.reasons(lost)
    others = tuple(name for name in EVERYONE if name != lost)
    assert outcome.participants() == [EVERYONE, others, EVERYONE, EVERYONE]
    absent, _ = play(
        federation(tiny_llama, text, BY_ROUND[0], **sections),
        around=lambda simulation: Losing(simulation, lost, 2, moved=False),
    )
    assert difference(outcome.state, absent) < 1e-6


@pytest.mark.fault(
    "a site cannot load the blocks of its new cut", "it says so; nobody waits; back in the next round"
)
def test_a_site_that_cannot_load_its_new_blocks_costs_nobody_time_and_is_back_in_the_next_round(
    tiny_llama, text, tmp_path, monkeypatch
):
    sections = {"training": {"rounds": 4, "steps": 3, "optimizer_state": "keep"}}
    prepared = federation(tiny_llama, text, BY_ROUND[0], **sections)
    checkpoint, failures = prepared.clients[0].segment._checkpoint, []
    read = checkpoint.read

    def vanished(names):
        if not failures:
            failures.append(names)
            raise ModelError("the disk is gone")
        return read(names)

    monkeypatch.setattr(checkpoint, "read", vanished)
    began = time.monotonic()
    outcome = deployed(prepared, controller=moving, kept=tmp_path)
    assert time.monotonic() - began < SPEC.join_s / 4
    assert outcome.error is None
    assert outcome.states("client-1") == ["failed", "back"]
    assert outcome.reasons("client-1").startswith("the disk is gone; ")
    assert outcome.participants() == [EVERYONE, EVERYONE[1:], EVERYONE, EVERYONE]
    absent, _ = play(
        federation(tiny_llama, text, BY_ROUND[0], **sections),
        around=lambda simulation: Losing(simulation, "client-1", 2, moved=False),
    )
    assert difference(outcome.state, absent) < 1e-6


@pytest.mark.fault(
    "a site's disk is full", "it says so in each round; after three it leaves the session; others go on"
)
def test_a_site_that_cannot_write_says_why_and_leaves_the_session_in_the_end(tiny_llama, text, tmp_path):
    (tmp_path / "client-1").touch()  # where its folder should be
    training = {"rounds": 5, "steps": 2, "optimizer_state": "keep"}
    outcome = deployed(federation(tiny_llama, text, CUTS, training=training), kept=tmp_path)
    assert outcome.error is None
    assert outcome.states("client-1") == ["failed", "back", "failed", "back", "declined"]
    *failed, left = [e.reason for e in outcome.of("SiteChanged") if e.state in ("failed", "declined")]
    assert set(failed) == {"its disk or its system failed: File exists"}
    assert left == "it failed 3 times in a row: its disk or its system failed: File exists"
    assert outcome.participants() == [EVERYONE[1:]] * 5


def test_a_fault_of_a_site_s_own_program_is_told_without_its_words(parties, monkeypatch):
    prepared, calls = parties(rounds=3), []
    forward = prepared.clients[0].forward

    def failing():
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("a line of somebody's text")
        return forward()

    monkeypatch.setattr(prepared.clients[0], "forward", failing)
    outcome = deployed(prepared)
    assert outcome.error is None
    assert outcome.states("client-1") == ["failed", "back"]
    assert outcome.reasons("client-1").startswith("unexpected RuntimeError; its own log says more; ")
    assert outcome.participants() == [EVERYONE, EVERYONE[1:], EVERYONE]


def test_when_nobody_is_heard_the_server_s_own_line_is_named(parties):
    spec = SPEC.model_copy(update={"silence_s": 1.0})
    cut = threading.Event()

    class Cut:
        """Carries nothing from the first step of round 2 on."""

        def __init__(self, transport):
            self._transport = transport

        def ask(self, data, within_s):
            if kind_of(data) == "AdapterUpload":
                cut.set()
            if cut.is_set():
                raise KilledError("cut")
            return self._transport.ask(data, within_s)

    outcome = deployed(parties(), dict.fromkeys(EVERYONE, Cut), spec)
    assert isinstance(outcome.error, PausedError)
    lost = [event for event in outcome.of("SiteChanged") if event.state == "lost"]
    assert any("nor of any other site: is the server connected?" in event.reason for event in lost)
