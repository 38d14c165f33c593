"""A site whose numbers are not possible in this run is left out alone; with any others the session starts."""

from __future__ import annotations

import re
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.network import serve_with, site_thread
from laws.federations import write_text
from splitft.config import from_mapping
from splitft.deploy.requests import Direct, RequestChannel
from splitft.deploy.run_terms import load_run_terms
from splitft.deploy.server.registration import unfit
from splitft.deploy.server.session import ServerSession
from splitft.deploy.server.setup import open_server
from splitft.deploy.server.steady_schedule import SteadySchedule
from splitft.deploy.site.setup import open_site
from splitft.errors import ScheduleError
from splitft.protocol import Activations, Declined, Register
from splitft.tracking.events import StepDone
from splitft.tracking.log import read_events

KEY = bytes(range(16))
NAMES = ("client-1", "client-2", "client-3")
MACHINE = {
    "block_forward_ms_per_token": 0.5, "block_backward_ms_per_token": 0.5, "head_ms_per_token": 0.1,
    "memory_gb": 4.0,
}  # fmt: skip


def configured(folder, model, controller="makespan", server_gb=4.0):
    return from_mapping({
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"source": str(write_text(folder / "notes.jsonl")), "max_tokens": 32},
        "clients": {"count": 3, "cuts": [1, 2, 2] if controller == "fixed" else "auto"},
        "lora": {"rank": 4, "rank_at_cut": None},
        "training": {"rounds": 2, "steps": 1, "batch_size": 2},
        "schedule": {
            "controller": controller, "devices": MACHINE, "links": "lan",
            "server": {**MACHINE, "memory_gb": server_gb},
        },
        "deploy": {"window_ms": 2, "min_clients": 1, "join_s": 60},
    })  # fmt: skip


@pytest.fixture(scope="module")
def honest(tiny_llama, tmp_path_factory):
    """The configuration and what its three sites register."""
    config = configured(tmp_path_factory.mktemp("registration"), tiny_llama)
    return config, {name: open_site(config, name).register for name in NAMES}


EXTREMES = [5e-324, 1e-300, 1e-12, 1e-3, 0.5, 1.0, 2.0, 3.5, 64.0, 1e9, 1e300, 1.7e308]
ANY = st.sampled_from(EXTREMES) | st.floats(min_value=5e-324, max_value=1.7e308)
COUNT = st.sampled_from([0, 1, 2, 40, 2**40, 2**63 - 1]) | st.integers(0, 10**4)
FIELDS = ("tokens_per_batch", "labelled_per_batch", "sequences_per_batch", "padded_length")
COUNTS = ("train_examples", "train_tokens", "eval_examples", "truncated")
DEVICE = st.fixed_dictionaries(dict.fromkeys(MACHINE, ANY), optional={"block_overhead_ms": ANY})


def changed(register):
    """Strategy: a registration with any of its numbers replaced."""
    numbers = st.fixed_dictionaries({}, optional={
        **dict.fromkeys(FIELDS, ANY), **dict.fromkeys(COUNTS, COUNT),
        "min_cut": st.integers(1, 9), "device": DEVICE,
    })  # fmt: skip
    return numbers.map(lambda given: Register.model_validate({**register.model_dump(), **given}))


@st.composite
def admitted(draw, register):
    """Strategy: a registration at and between the bounds of this run."""
    sequences = draw(st.sampled_from([1.0, 1.5, 2.0]))
    longest = draw(st.sampled_from([2.0, 17.3, 32.0]))
    tokens = draw(st.sampled_from([sequences * 2, sequences * longest]))
    labelled = draw(st.sampled_from([sequences, tokens]))
    in_range = st.sampled_from([1e-12, 1e-6, 1.0, 1e6, 1e9])
    device = st.fixed_dictionaries(dict.fromkeys(MACHINE, in_range), optional={"block_overhead_ms": in_range})
    examples = draw(st.sampled_from([2, 40, 2**40]))
    return register.model_copy(update={
        "sequences_per_batch": sequences, "padded_length": longest, "tokens_per_batch": tokens,
        "labelled_per_batch": labelled, "train_examples": examples, "train_tokens": 32 * examples,
        "min_cut": draw(st.integers(1, 3)), "device": draw(device | st.just({})),
    })  # fmt: skip


def test_what_honest_sites_register_fits(honest):
    config, registered = honest
    assert [unfit(config, 4, name, one) for name, one in registered.items()] == [None] * 3


@pytest.mark.parametrize("controller", ["makespan", "resources", "paper", "fixed"])
@pytest.mark.hostile(
    "a site registers any numbers at all, controller {controller}", "it is refused, or the session starts"
)
def test_whatever_one_site_registers_it_is_refused_or_the_session_starts(
    honest, tmp_path, tiny_llama, controller
):
    config, registered = honest
    config = configured(tmp_path, tiny_llama, controller)
    terms = load_run_terms(config)
    refused = []

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(changed(registered["client-2"]) | admitted(registered["client-2"]), st.data())
    def holds(register, data):
        reason = unfit(config, 4, "client-2", register)
        refused.append(reason)
        if reason:
            assert "client-2" not in reason
            return
        party = open_server(terms, {**registered, "client-2": register})
        assert {"client-1", "client-3"} <= party.cuts.keys()
        assert party.cuts.keys() | party.left_out.keys() == set(NAMES)
        seconds = st.dictionaries(
            st.sampled_from(["client_forward", "head", "client_backward"]),
            st.sampled_from([0.0, 1e-9, 1.0, 1e6]),
        )
        losses = dict.fromkeys(party.cuts, 3.0) | {
            "client-2": data.draw(st.sampled_from([-1e6, 0.0, 3.0, 1e6]))
        }
        losses = {name: losses[name] for name in party.cuts}
        for name in party.cuts:
            party.schedule.observe(
                StepDone(
                    round=1, step=0, client=name, loss=1, tokens=1, examples=1, seconds=data.draw(seconds)
                )
            )
        warnings = []
        steady = SteadySchedule(party.schedule, warnings.append)
        cuts = steady.choose(2, party.cuts, losses).cuts
        timed = steady.charge(2, tuple(party.cuts), party.cuts, cuts)
        assert timed.seconds < float("inf")
        assert not warnings

    holds()
    assert any(refused)
    assert not all(refused)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.data())
def test_any_mix_of_extreme_but_possible_numbers_starts(honest, data):
    config, registered = honest
    mixed = {name: data.draw(admitted(one)) for name, one in registered.items()}
    fits = {name: one for name, one in mixed.items() if unfit(config, 4, name, one) is None}
    assert fits.keys() == mixed.keys()
    if all(one.device.get("memory_gb", 4.0) < 1 for one in mixed.values()):
        with pytest.raises(ScheduleError, match="no client fits at any cut"):
            open_server(load_run_terms(config), mixed)
        return
    party = open_server(load_run_terms(config), mixed)
    assert party.cuts.keys() | party.left_out.keys() == set(NAMES)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"tokens_per_batch": 1.7e308},
            r"tokens_per_batch 1.7e\+308; from 2 to \d+ is possible \(training.batch_size",
        ),
        ({"labelled_per_batch": 1e9}, "labelled_per_batch 1e.09, which must be at most tokens_per_batch"),
        ({"padded_length": 1e6}, r"padded_length 1e\+06; from 2 to 32 is possible \(data.max_tokens\)"),
        ({"train_tokens": 2**62}, r"train_tokens 4.61.* \(data.max_tokens\)"),
        ({"eval_examples": 10**6}, "eval_examples 1e.06; from 1 to 32 is possible"),
        ({"device": {**MACHINE, "head_ms_per_token": 5e-324}}, "head_ms_per_token 4.94066e-324"),
        ({"min_cut": 7}, "allows cuts from 7 on"),
    ],
)
def test_the_reason_names_the_number_and_what_fits(honest, change, words):
    config, registered = honest
    register = registered["client-2"].model_copy(update=change)
    assert re.search(words, unfit(config, 4, "client-2", register))


@pytest.mark.hostile("a site needs more of the server than there is", "it is left out alone")
def test_a_site_that_the_servers_memory_has_no_room_for_is_left_out_alone(honest, tiny_llama, tmp_path):
    """Its shallowest cut is possible, and the server cannot hold the rest of the model for all three."""
    config, registered = honest
    large = registered["client-2"].model_copy(update={
        "sequences_per_batch": 2.0, "padded_length": 32.0, "tokens_per_batch": 64.0,
        "labelled_per_batch": 62.0, "train_examples": 9, "train_tokens": 99,
    })  # fmt: skip
    together = {**registered, "client-2": large}
    roomy = open_server(load_run_terms(config), together).schedule
    needs = roomy.problem(1, dict.fromkeys(NAMES, 3)).server_bytes(dict.fromkeys(NAMES, 3))
    tight = configured(tmp_path, tiny_llama, server_gb=(needs - 1) / 1e9)
    party = open_server(load_run_terms(tight), together)
    assert set(party.cuts) == {"client-1", "client-3"}
    assert "the run cannot be planned with it" in party.left_out["client-2"]


@pytest.mark.hostile("a site registers 1.7e308 tokens a batch", "it is left out; the others train")
def test_one_absurd_registration_stops_nobody_else(tiny_llama, tmp_path):
    """It registers 1.7e308 tokens, declines, registers again and sends steps: the others train to the end."""
    config = configured(tmp_path, tiny_llama)
    terms = load_run_terms(config)
    server = ServerSession(terms, tmp_path / "run", NAMES, KEY)

    def hostile():
        channel = RequestChannel(Direct("client-2", server.inbox.answer), KEY, 0, terms.frame_limit)
        own = open_site(config, "client-2").register
        absurd = own.model_copy(update={"tokens_per_batch": 1.7e308})
        hidden = torch.zeros(2, terms.model.shape.width)
        step = Activations(
            client="client-2", round=0, step=0, training=True, lengths=(2,), labelled=((0, 1),), hidden=hidden
        )
        for message in (step, absurd, Declined(client="client-2", reason="no"), own, step):
            channel.ask(terms.serializer.to_bytes(message), 30)

    threads = [site_thread(config, name, server, KEY) for name in ("client-1", "client-3")]
    serve_with(server, [threading.Thread(target=hostile, daemon=True), *threads])
    events = list(read_events(tmp_path / "run/events.jsonl"))
    changes = [event for event in events if event.event == "SiteChanged"]
    assert {(event.site, event.state) for event in changes} == {("client-2", "declined")}
    assert "tokens_per_batch 1.7e+308" in changes[0].reason
    done = [event.participants for event in events if event.event == "RoundDone"]
    assert done == [("client-1", "client-3")] * 2


def test_a_controller_that_fails_between_rounds_keeps_the_cuts(honest):
    config, registered = honest
    party = open_server(load_run_terms(config), registered)

    class Failing:
        def choose(self, number, cuts, losses):
            raise ScheduleError("no cuts")

    warnings = []
    decision = SteadySchedule(Failing(), warnings.append).choose(2, party.cuts, {})
    assert decision.cuts == party.cuts
    assert "round 2: the cuts stay as they are: no cuts" in warnings[0].message
