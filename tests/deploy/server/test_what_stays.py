"""Factors that never leave a site, and codecs that remember at both ends: as in simulation."""

from __future__ import annotations

import threading

import pytest
import torch

from deploy.lines import BY_ROUND, CutUntil, Mended, Mending, moving
from deploy.network import EVERYONE, SPEC, deployed
from laws.federations import Losing, federation, largest_relative_difference, play, write_text
from splitft.errors import TransportError

CUTS = [1, 2, 3]
PERSONAL = {
    "fedsa": {"aggregate": {"rule": "fedsa"}},
    "private_blocks": {"privacy": {"private_blocks": 1}},
    "both": {"aggregate": {"rule": "fedsa"}, "privacy": {"private_blocks": 1}},
}
CODECS = {
    "temporal": {"hidden": "temporal", "gradient": "temporal"},
    "principal": {"hidden": "principal:bits=3", "gradient": "principal:bits=3"},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


def difference(one, other) -> float:
    return largest_relative_difference(one.adapters.tensors(), other.adapters.tensors())


def personal(prepared) -> dict[str, torch.Tensor]:
    """All factors that stay with a client, on either side of its cut."""
    on_server = prepared.server.client_states.own
    return {
        f"{client.name}/{side}/{name}": tensor
        for client in prepared.clients
        for side, own in (("client", client.blocks.personal()), ("server", on_server.get(client.name)))
        if own
        for name, tensor in own.tensors().items()
        if tensor.numel()
    }


class Repeating:
    """Sends each request twice, and loses every fifth answer."""

    def __init__(self, transport):
        self._transport, self._count = transport, 0

    def ask(self, data, within_s):
        answer = self._transport.ask(data, within_s)
        assert self._transport.ask(data, within_s) == answer
        self._count += 1
        if self._count % 5 == 0:
            raise TransportError("the answer was lost")
        return answer


# --- factors that never leave ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(PERSONAL))
def test_what_never_leaves_is_trained_as_in_simulation(kind, tiny_llama, text, tmp_path):
    sections = {"training": {"rounds": 3, "steps": 3, "optimizer_state": "keep"}, **PERSONAL[kind]}
    alone = federation(tiny_llama, text, CUTS, **sections)
    simulated, _ = play(alone)
    prepared = federation(tiny_llama, text, CUTS, **sections)
    outcome = deployed(prepared, dict.fromkeys(EVERYONE, Repeating), kept=tmp_path)
    assert outcome.error is None
    assert not outcome.of("SiteChanged")
    assert difference(outcome.state, simulated) < 1e-9
    assert personal(alone).keys() == personal(prepared).keys() != set()
    assert largest_relative_difference(personal(prepared), personal(alone)) < 1e-9
    assert outcome.state.losses == pytest.approx(simulated.losses, rel=1e-9)


@pytest.mark.parametrize("kind", sorted(PERSONAL))
@pytest.mark.parametrize("at", ["RoundReady", "AdapterUpload"])
@pytest.mark.fault(
    "a site with factors of its own ({kind}) is cut off at {at} of a round",
    "it goes on with the factors that the server counts",
)
def test_who_was_away_goes_on_with_its_own_factors(kind, at, tiny_llama, text, tmp_path):
    """With all that it had when the round began that it missed, whichever message was lost."""
    sections = {"training": {"rounds": 4, "steps": 3, "optimizer_state": "keep"}, **PERSONAL[kind]}
    moves = moving if at == "RoundReady" else (lambda number, cuts: cuts)
    spec, mended, lost = SPEC.model_copy(update={"silence_s": 2.0}), Mended(), "client-1"
    transports = {
        lost: lambda transport: CutUntil(transport, at, 2, mended),
        "client-3": lambda transport: Mending(
            transport, *(("AdapterUpload", 2) if at == "RoundReady" else ("Evaluation", 3)), mended
        ),
    }
    prepared = federation(tiny_llama, text, BY_ROUND[0], **sections)
    outcome = deployed(prepared, transports, spec, controller=moves, kept=tmp_path)
    assert outcome.error is None
    assert outcome.states(lost) == ["lost", "back"], outcome.reasons(lost)
    assert outcome.participants() == [EVERYONE, EVERYONE[1:], EVERYONE, EVERYONE]
    alone = federation(tiny_llama, text, BY_ROUND[0], **sections)
    absent, _ = play(alone, moves, around=lambda simulation: Losing(simulation, lost, 2, moved=False))
    assert difference(outcome.state, absent) < 1e-9
    assert largest_relative_difference(personal(prepared), personal(alone)) < 1e-9


# --- codecs that remember at both ends ---------------------------------------------------------------


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.fault("each message comes twice and answers are lost, codec {codec}", "both ends learn the same")
def test_codecs_that_learn_round_as_in_simulation_however_often_messages_come(codec, tiny_llama, text):
    sections = {"training": {"rounds": 3, "steps": 5}, "wire": CODECS[codec]}
    simulated, _ = play(federation(tiny_llama, text, CUTS, **sections))
    outcome = deployed(federation(tiny_llama, text, CUTS, **sections), dict.fromkeys(EVERYONE, Repeating))
    assert outcome.error is None
    assert not outcome.of("SiteChanged")
    assert difference(outcome.state, simulated) < 1e-9
    assert outcome.state.losses == pytest.approx(simulated.losses, rel=1e-9)


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.fault(
    "a site is cut off within a round, codec {codec}", "both ends of its channel begin anew when it is back"
)
def test_codecs_begin_anew_at_both_ends_when_a_site_is_back(codec, tiny_llama, text):
    sections = {"training": {"rounds": 4, "steps": 5}, "wire": CODECS[codec]}
    spec, mended, lost = SPEC.model_copy(update={"silence_s": 2.0}), Mended(), "client-1"
    transports = {
        lost: lambda transport: CutUntil(transport, "HeadGradient", 8, mended),
        "client-3": lambda transport: Mending(transport, "Evaluation", 3, mended),
    }
    outcome = deployed(federation(tiny_llama, text, CUTS, **sections), transports, spec)
    assert outcome.error is None
    assert outcome.states(lost) == ["lost", "back"], outcome.reasons(lost)
    assert outcome.participants() == [EVERYONE, EVERYONE[1:], EVERYONE, EVERYONE]
    absent, _ = play(
        federation(tiny_llama, text, CUTS, **sections),
        around=lambda simulation: Losing(simulation, lost, 2, moved=False),
    )
    assert difference(outcome.state, absent) < 1e-9


@pytest.mark.fault("a site is stopped for being slow, codec temporal", "its finished steps count")
def test_a_site_that_is_stopped_goes_on_with_what_both_ends_have_learned(tiny_llama, text):
    class Slow:
        def __init__(self, transport):
            self._transport = transport

        def ask(self, data, within_s):
            if len(data) > 2000:
                threading.Event().wait(0.2)
            return self._transport.ask(data, within_s)

    spec = SPEC.model_copy(update={"slack": 1.0, "patience_s": 1.0})
    sections = {"training": {"rounds": 2, "steps": 12}, "wire": CODECS["temporal"]}
    outcome = deployed(federation(tiny_llama, text, CUTS, **sections), {"client-2": Slow}, spec)
    assert outcome.error is None
    assert set(outcome.states("client-2")) == {"late"}
    assert outcome.participants() == [EVERYONE, EVERYONE]


# --- codecs that each site chooses -------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["client", "server"])
def test_sites_choose_the_codecs_that_they_choose_in_simulation(labels, tiny_llama, text):
    sections = {
        "training": {"rounds": 2, "steps": 4},
        "wire": {"hidden": "auto", "gradient": "auto", "budget": 0.02},
        "split": {"labels": labels},
    }
    alone = federation(tiny_llama, text, CUTS, **sections)
    simulated, _ = play(alone)
    outcome = deployed(federation(tiny_llama, text, CUTS, **sections), dict.fromkeys(EVERYONE, Repeating))
    assert outcome.error is None
    assert not outcome.of("SiteChanged")
    chosen = {one.client: (one.hidden, one.gradient) for one in alone.chosen}
    assert {one.client: (one.hidden, one.gradient) for one in outcome.of("WireChosen")} == chosen
    assert len(set(chosen.values())) >= 1
    assert difference(outcome.state, simulated) < 1e-9


# --- a round that is undone --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["temporal", "both"])
@pytest.mark.fault(
    "a round is undone, with codecs that learn or factors of the sites' own ({kind})",
    "all go on as in simulation, with codecs that begin anew at both ends",
)
def test_after_a_round_that_is_undone_all_go_on_as_in_simulation(
    kind, tiny_llama, text, tmp_path, monkeypatch
):
    asked = []

    def failure(now, before):
        asked.append(now)
        return "as the test has it" if len(asked) == 2 else ""

    monkeypatch.setattr("splitft.training.rounds.round_failure", failure)
    own = PERSONAL[kind] if kind in PERSONAL else {"wire": CODECS[kind]}
    sections = {"training": {"rounds": 3, "steps": 5}, **own}
    alone = federation(tiny_llama, text, CUTS, **sections)
    simulated, events = play(alone)
    assert [event.round for event in events if event.event == "RoundUndone"] == [2]
    asked.clear()
    prepared = federation(tiny_llama, text, CUTS, **sections)
    outcome = deployed(prepared, kept=tmp_path)
    assert outcome.error is None
    assert [event.round for event in outcome.of("RoundUndone")] == [2]
    assert difference(outcome.state, simulated) < 1e-9
    assert outcome.state.losses == pytest.approx(simulated.losses, rel=1e-9)
    if kind in PERSONAL:
        assert largest_relative_difference(personal(prepared), personal(alone)) < 1e-9
