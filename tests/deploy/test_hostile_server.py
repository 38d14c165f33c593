"""A server that asks a site for more than it may is declined with the reason, before anything is done."""

from __future__ import annotations

import logging
import time

import pytest
import torch

from deploy.network import HEAD_BYTES, KEY, LIMIT, deployed, registration
from laws.federations import federation, write_text
from splitft.codecs import Encoded
from splitft.deploy.manifest import manifest_of
from splitft.deploy.requests import Envelope
from splitft.deploy.site.connection import Connection
from splitft.deploy.site.limits import OrderLimits
from splitft.deploy.site.policy import SitePolicy
from splitft.deploy.site.session import HURRIED_S, SiteSession
from splitft.deploy.site.site_store import SiteStore
from splitft.protocol.frame import Frame, open_frame
from splitft.specs import SiteSpec

CUTS = [1, 2, 3]
VICTIM = "client-2"
HUGE = 2**62
STEERING = "\x1b[2Jgone\r\n2026-11-28 INFO all is well\u202e\0"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


class Tampering:
    """A transport on which the server's orders of one kind are changed, as a hostile server's would be."""

    def __init__(self, own, kind, change):
        self._own, self._kind, self._change = own, kind, change

    def ask(self, data, within_s):
        answer = self._own.ask(data, within_s)
        frame = open_frame(answer[HEAD_BYTES:]).read()
        if frame.kind != self._kind:
            return answer
        return answer[:HEAD_BYTES] + self._change(frame).to_bytes()


def with_fields(**fields):
    return lambda frame: Frame(frame.kind, {**frame.fields, **fields}, frame.tensors)


def scaled(factor):
    """The frame with every tensor times a factor."""

    def change(frame):
        tensors = {
            name: Encoded(
                one.role, one.codec, one.dtype, one.shape, {"": one.parts[""] * factor}, one.parameters
            )
            if "" in one.parts
            else one
            for name, one in frame.tensors.items()
        }
        return Frame(frame.kind, frame.fields, tensors)

    return change


def deploy(model, text, kind, change, limits=None, **sections):
    prepared = federation(model, text, CUTS, **{"training": {"rounds": 2, "steps": 2}, **sections})
    spec = SiteSpec.model_validate({"limits": limits or {}})

    def policy():
        own = OrderLimits(spec.limits, prepared.config.training)
        return SitePolicy(spec, prepared.model, head=True, limits=own)

    return deployed(
        prepared,
        transports={VICTIM: lambda own: Tampering(own, kind, change)},
        policies={f"client-{number}": policy() for number in (1, 2, 3)},
        manifest=manifest_of(prepared.model),
    )


ORDERS = {
    "2^62 steps a round": ("Train", with_fields(steps=HUGE), "training.steps of the run"),
    "a step too many": ("Train", with_fields(steps=3), "training.steps of the run"),
    "2^62 steps taken": ("Join", with_fields(steps=HUGE), "are possible"),
    "a round after the last to begin": ("RoundStart", with_fields(round=3), "training.rounds of the run"),
    "a round after the last to train": ("Train", with_fields(round=HUGE), "training.rounds of the run"),
    "a round after the last to evaluate": ("Evaluate", with_fields(round=3), "training.rounds of the run"),
    "adapters a million times too large": ("GlobalAdapters", scaled(1e6), "limits.adapter_norm"),
    "adapters of 1e30": ("GlobalAdapters", scaled(1e30), "limits.adapter_norm"),
    "adapters that overflow": ("GlobalAdapters", scaled(1e200), "limits.adapter_norm"),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.hostile("a server orders: {name}", "the site declines and names the limit; the others go on")
def test_an_order_beyond_the_limits_is_declined_and_the_others_go_on(tiny_llama, text, name):
    kind, change, key = ORDERS[name]
    outcome = deploy(tiny_llama, text, kind, change)
    assert outcome.error is None
    assert outcome.states(VICTIM) == ["declined"], outcome.reasons(VICTIM)
    assert key in outcome.reasons(VICTIM)
    assert all({"client-1", "client-3"} <= set(one) for one in outcome.participants())
    assert outcome.state.adapters.all_finite()


def test_steps_that_only_count_in_batches_of_tokens_are_not_searched_for(tiny_llama, text):
    training = {"rounds": 2, "steps": 2, "batch_tokens": 40}
    outcome = deploy(tiny_llama, text, "Join", with_fields(steps=HUGE), training=training)
    assert "are possible" in outcome.reasons(VICTIM)


def test_an_honest_server_meets_no_limit(tiny_llama, text):
    outcome = deploy(
        tiny_llama, text, "Train", lambda frame: frame, limits={"attempts": 1, "adapter_norm": 1}
    )
    assert outcome.error is None
    assert not outcome.of("SiteChanged")
    assert outcome.participants() == [("client-1", "client-2", "client-3")] * 2


# --- a server by hand -----------------------------------------------------------------------------


class Server:
    """A server that answers every request with the next of its frames, the last of them for ever."""

    def __init__(self, *frames):
        self.frames, self.heard = list(frames), []

    def ask(self, data, within_s):
        envelope = Envelope.from_bytes(data, KEY, LIMIT)
        self.heard.append(open_frame(envelope.frame).read())
        frame = self.frames.pop(0) if len(self.frames) > 1 else self.frames[0]
        return Envelope(KEY, envelope.channel, envelope.number, frame.to_bytes()).to_bytes()


ZERO = {"": torch.zeros(1)}


def session(model, text, server, policy=None):
    prepared = federation(model, text, [2], clients={"count": 1, "cuts": [2]})
    [client] = prepared.clients
    connection = Connection(server, KEY, prepared.serializer, LIMIT, patience_s=5)
    return prepared, SiteSession(
        registration(client.name), connection, lambda cut: client, SiteStore(None),
        policy and policy(prepared),
    )  # fmt: skip


def assert_printable(*texts):
    for one in texts:
        assert one.isprintable(), repr(one)


def test_the_last_words_of_a_server_are_printable(tiny_llama, text, caplog):
    server = Server(
        Frame("Refused", {"error": STEERING, "reason": STEERING * 500}), Frame("Leave", {"reason": STEERING})
    )
    _, site = session(tiny_llama, text, server)
    with caplog.at_level(logging.INFO):
        ended = site.run()
    assert_printable(ended, *(record.getMessage() for record in caplog.records))
    assert "\\x1b[2Jgone\\r\\n" in ended
    assert max(len(record.getMessage()) for record in caplog.records) < 4500


@pytest.mark.parametrize(
    "frame",
    [
        Frame(STEERING, {}, sender=STEERING),
        Frame("Leave", {STEERING: 1}, sender=STEERING),
        Frame("Wait", {}, {STEERING: Encoded("hidden", "fp32", torch.float32, (1,), ZERO)}),
        Frame("Wait", {}, {STEERING: Encoded(STEERING[:9], STEERING[:9], torch.float32, (1,), ZERO)}),
    ],
    ids=["kind and sender", "key", "tensor", "role and codec"],
)  # fmt: skip
@pytest.mark.hostile("a server sends names with terminal control codes ({id})", "they are shown as text")
def test_what_a_server_calls_things_never_steers_the_log_of_a_site(tiny_llama, text, caplog, frame):
    _, site = session(tiny_llama, text, Server(Frame("Wait", {}), frame, Frame("Leave", {"reason": "done"})))
    with caplog.at_level(logging.INFO):
        assert site.run() == "done"
    assert [record for record in caplog.records if "is out of this round" in record.getMessage()]
    assert_printable(*(record.getMessage() for record in caplog.records))


@pytest.mark.hostile("a server lets a site wait no time at all", "the site asks at its own pace")
def test_a_server_that_hurries_is_asked_at_a_walking_pace(tiny_llama, text):
    _, site = session(tiny_llama, text, Server(*[Frame("Wait", {})] * 6, Frame("Leave", {"reason": "done"})))
    began = time.monotonic()
    site.run()
    assert time.monotonic() - began >= 6 * HURRIED_S


@pytest.mark.hostile("a server asks for the same evaluation again and again", "declined")
def test_the_same_evaluation_again_and_again_is_declined(tiny_llama, text):
    def policy(prepared):
        spec = SiteSpec.model_validate({"limits": {"attempts": 3}})
        return SitePolicy(spec, prepared.model, head=True)

    prepared = federation(tiny_llama, text, [2], clients={"count": 1, "cuts": [2]})
    manifest = [list(one) for one in manifest_of(prepared.model)]
    join = Frame("Join", {"round": 0, "cut": 2, "steps": 0, "manifest": manifest})
    stop = Frame("Stop", {"round": 1})

    class Asking(Server):
        """Orders an evaluation whenever it is asked for an order; answers held-out batches with silence."""

        def ask(self, data, within_s):
            kind = open_frame(Envelope.from_bytes(data, KEY, LIMIT).frame).kind
            if kind == "Activations":
                self.frames.insert(0, Frame("Refused", {"error": "Unlucky", "reason": "ask again"}))
            elif kind == "Declined":
                self.frames.insert(0, Frame("Leave", {"reason": "declined"}))
            elif kind == "Next":
                again = (
                    join
                    if self.heard and self.heard[-1].kind == "Activations"
                    else Frame("Evaluate", {"round": 0})
                )
                self.frames.insert(0, again)
            return super().ask(data, within_s)

    server = Asking(join, stop)
    _, site = session(tiny_llama, text, server, policy)
    site.run()
    declined = [frame.fields["reason"] for frame in server.heard if frame.kind == "Declined"]
    assert len(declined) == 1
    assert "limits.attempts" in declined[0]
    assert sum(frame.kind == "Activations" for frame in server.heard) == 3
