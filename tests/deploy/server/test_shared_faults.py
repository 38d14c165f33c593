"""A site that vanishes, hangs or comes back in a step on shared factors costs the others nothing."""

from __future__ import annotations

import time

import pytest
from safetensors.torch import load_file

from deploy.network import HEAD_BYTES, KEY, SPEC, deployed, kind_of, serve_with, site_thread
from deploy.server.test_federation import Cut, Dying
from deploy.server.test_shared_factors import CUTS, EVERYONE, FLEET, MODES, TRAINING, assert_equal
from laws.federations import federation, largest_relative_difference, play, write_text
from splitft.config import from_mapping
from splitft.deploy.run_terms import load_run_terms
from splitft.deploy.server.session import ServerSession
from splitft.protocol.frame import Frame, open_frame
from splitft.schedule.arrival_order import StepMark


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


@pytest.fixture
def parties(tiny_llama, text):
    def make(mode, **sections):
        sections = {"split": {"server_adapters": mode}, "training": TRAINING, "schedule": FLEET} | sections
        return federation(tiny_llama, text, CUTS, **sections)

    return make


@pytest.mark.fault(
    "a site vanishes in the middle of a step, {mode}", "the others go on; of its step nothing remains"
)
@pytest.mark.parametrize("mode", MODES)
def test_a_site_that_vanishes_in_the_middle_of_a_step_does_not_hold_up_the_others(parties, mode):
    spec = SPEC.model_copy(update={"silence_s": 2.0})
    outcome = deployed(
        parties(mode), {"client-2": lambda transport: Dying(transport, "HeadGradient", 2)}, spec
    )
    assert outcome.error is None
    assert outcome.states("client-2") == ["lost"]
    assert outcome.participants() == [("client-1", "client-3")] * 2
    for name in ("client-1", "client-3"):
        assert [one.step for one in outcome.of("StepDone") if one.client == name] == list(range(6))
    assert [one.step for one in outcome.of("StepDone") if one.client == "client-2"] == [0]
    assert outcome.state.adapters.all_finite()


class Hanging:
    """Is alive, and does not send its n-th gradient for some seconds."""

    def __init__(self, transport, nth, seconds):
        self._transport, self._left, self._seconds = transport, nth, seconds

    def ask(self, data, within_s):
        if kind_of(data) == "HeadGradient":
            self._left -= 1
            if self._left == 0:
                time.sleep(self._seconds)
        return self._transport.ask(data, within_s)


@pytest.mark.fault("a site hangs in a common step, alive", "it is stopped, and the others go on")
def test_a_site_that_hangs_in_a_common_step_is_stopped_and_the_others_go_on(parties):
    spec = SPEC.model_copy(update={"slack": 1.0, "patience_s": 2.0})
    outcome = deployed(parties("shared"), {"client-2": lambda transport: Hanging(transport, 2, 6)}, spec)
    assert outcome.error is None
    assert outcome.states("client-2")[0] == "late"
    for name in ("client-1", "client-3"):
        assert [one.step for one in outcome.of("StepDone") if one.client == name] == list(range(6))


@pytest.mark.fault(
    "a site is silent in its turn for longer than turn_s", "the turn passes on, and it takes the step again"
)
def test_a_turn_passes_on_and_the_step_is_taken_again(parties):
    """The oracle is a simulation whose steps come in the order in which they were completed."""
    spec = SPEC.model_copy(update={"turn_s": 0.5})
    outcome = deployed(
        parties("shared-in-turn"), {"client-2": lambda transport: Cut(transport, "HeadGradient", 2, 4)}, spec
    )
    done = [(event.round, event.client) for event in outcome.of("StepDone")]

    def order(number, cuts, steps):
        return [
            StepMark(client, event) for r, client in done if r == number for event in ("begins", "completes")
        ]

    def ordered(simulation):
        simulation._order = order
        return simulation

    assert_equal(outcome, play(parties("shared-by-arrival"), around=ordered)[0])
    assert sorted(done) == sorted((r, name) for r in (1, 2) for name in EVERYONE for _ in range(3))
    first = [client for number, client in done if number == 1]
    assert first[-1] == "client-2"  # the others were not held up by its line


@pytest.mark.fault(
    "a turn passes, in a run that protects labels",
    "the site shows no second gradient: it is out of the round",
)
def test_where_labels_are_protected_no_step_is_taken_again(parties):
    noise = {"gradient": {"defence": "gaussian", "noise": 0.1}}
    outcome = deployed(
        parties("shared-in-turn", privacy=noise, training={"rounds": 2, "steps": 2}),
        {"client-2": lambda transport: Cut(transport, "HeadGradient", 2, 4)},
        SPEC.model_copy(update={"turn_s": 0.5}),
    )
    assert outcome.error is None
    assert outcome.states("client-2") == ["failed", "back"], outcome.reasons("client-2")
    assert "protects labels" in outcome.reasons("client-2")
    assert outcome.participants() == [("client-1", "client-3"), EVERYONE]


class NeverDone:
    """A server that asks for the same step again each time, as a hostile one might."""

    def __init__(self, transport):
        self._transport = transport

    def ask(self, data, within_s):
        answer = self._transport.ask(data, within_s)
        frame = open_frame(answer[HEAD_BYTES:]).read()
        if frame.kind != "CutGradient":
            return answer
        return answer[:HEAD_BYTES] + Frame("Again", {"step": frame.fields["step"]}, {}).to_bytes()


def test_a_server_that_asks_for_a_step_again_and_again_is_not_obeyed(parties):
    outcome = deployed(parties("per-client", training={"rounds": 1, "steps": 1}), {"client-2": NeverDone})
    assert outcome.error is None
    assert outcome.participants() == [("client-1", "client-3")]


# --- the next session ------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [CUTS, [1, 4, 3], "whole"])
def test_the_next_session_goes_on_with_the_moments_of_shared_factors(tiny_llama, tmp_path, text, cuts):
    def session(folder, rounds):
        config = from_mapping({
            "model": {"name": str(tiny_llama), "dtype": "float64"},
            "data": {"source": str(text), "max_tokens": 32},
            "clients": {"count": 3, "cuts": cuts},
            "lora": {"rank": 4, "rank_at_cut": None},
            "split": {"server_adapters": "shared"},
            "training": {"rounds": rounds, "steps": 2, "batch_size": 2, "optimizer_state": "keep"},
            "aggregate": {"rule": "factors"},
            "wire": {"hidden": "fp64", "gradient": "fp64", "adapter": "fp64"},
            "deploy": {"window_ms": 2, "min_clients": 3},
        })  # fmt: skip
        server = ServerSession(load_run_terms(config), folder / "run", EVERYONE, KEY)
        serve_with(
            server,
            [site_thread(config, name, server, KEY, folder=folder / "sites" / name) for name in EVERYONE],
        )
        return load_file(folder / "run/adapter/adapter_model.safetensors")

    session(tmp_path / "twice", 1)
    resumed = session(tmp_path / "twice", 2)
    assert largest_relative_difference(resumed, session(tmp_path / "once", 2)) < 1e-6
