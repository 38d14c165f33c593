"""What a site claims that trains alone is bounded by what it registered and what was ordered."""

from __future__ import annotations

import pytest

from deploy.network import SPEC, deployed, kind_of
from laws.federations import federation, write_text
from splitft.deploy.server.claims import SiteLimits, check_alone
from splitft.deploy.site.steps import SiteSteps
from splitft.errors import ProtocolError
from splitft.protocol import LocalStep
from splitft.specs import TrainingSpec

TRAINING = TrainingSpec(rounds=2, steps=5, batch_size=4)
LIMITS = SiteLimits(longest=32, examples=10, tokens=200, held_out=3)


def claim(**values):
    return LocalStep(**{"client": "a", "round": 1, "step": 0, "training": True, "sequences": 4,
                        "tokens": 90, "loss": 2.0, **values})  # fmt: skip


def test_what_a_site_can_have_is_accepted():
    check_alone(claim(), TRAINING)
    LIMITS.check_alone(claim(), TRAINING, 500)
    LIMITS.check_alone(claim(training=False, sequences=10**3, tokens=10**4), TRAINING, 10**9)


@pytest.mark.parametrize(
    ("values", "before", "words"),
    [
        ({"tokens": 4 * 31 + 1}, 0, "at most 124"),
        ({"sequences": 11, "tokens": 90}, 0, "registered 200 of 10"),
        ({"tokens": 120}, 4 * 200 - 119, "after 681 in this round"),  # five steps meet four epochs at most
        ({"training": False, "sequences": 3, "tokens": 94}, 0, "at most 93"),
    ],
)
def test_more_than_a_site_can_have_is_refused(values, before, words):
    with pytest.raises(ProtocolError, match=words):
        LIMITS.check_alone(claim(**values), TRAINING, before)


@pytest.mark.parametrize("values", [{"sequences": 5}, {"loss": 1e7}])
def test_what_no_batch_of_the_run_has_is_refused(values):
    with pytest.raises(ProtocolError):
        check_alone(claim(**values), TRAINING)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": 7}, "step"),
        ({"round": 2}, "round"),
        ({"tokens": 10**6}, "tokens"),
        ({"sequences": 99}, "99 sequences"),
        ({"training": False}, "training"),
    ],
)
@pytest.mark.fault("a site that trains alone claims {change}", "it is refused; the others go on")
def test_a_site_that_claims_what_was_not_due_is_out_of_the_round(
    tiny_llama, tmp_path, monkeypatch, change, words
):
    text = write_text(tmp_path / "notes.jsonl")
    prepared = federation(tiny_llama, text, [4, 1, 2], training={"rounds": 1, "steps": 2})
    report = SiteSteps._report

    def lying(self, message):
        report(self, message.model_copy(update=change) if message.training and message.step else message)

    monkeypatch.setattr(SiteSteps, "_report", lying)
    outcome = deployed(prepared, spec=SPEC)
    assert outcome.error is None
    whole = prepared.clients[0].name
    assert outcome.states(whole)[0] == "refused"
    assert words in outcome.reasons(whole)
    assert outcome.participants() == [("client-2", "client-3")]


def test_a_site_whose_blocks_the_server_has_reports_no_steps_of_its_own(tiny_llama, tmp_path):
    text = write_text(tmp_path / "notes.jsonl")
    prepared = federation(tiny_llama, text, [1, 2], training={"rounds": 1, "steps": 2})
    serializer = prepared.serializer

    class Alone:
        """Says that it has taken the step itself, in place of its activations."""

        def __init__(self, transport):
            self._transport = transport

        def ask(self, data, within_s):
            if kind_of(data) != "Activations":
                return self._transport.ask(data, within_s)
            from deploy.network import HEAD_BYTES

            frame = serializer.to_bytes(claim(client="client-1", sequences=1, tokens=1))
            return self._transport.ask(data[:HEAD_BYTES] + frame, within_s)

    outcome = deployed(prepared, {"client-1": Alone})
    assert "the server holds blocks for it" in outcome.reasons("client-1")
    assert outcome.participants() == [("client-2",)]
