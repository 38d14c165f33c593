"""Whatever a peer sends: a named refusal before anything is allocated or used, and nobody else is touched."""

from __future__ import annotations

import math
import struct
import threading
import tracemalloc

import pytest
import torch

from deploy.network import BATCH_TOKENS, KEY, LIMIT, SPEC, deployed, hello
from laws.federations import federation, largest_relative_difference, play, write_text
from splitft.adapters import AdapterState, Factors
from splitft.codecs import Encoded
from splitft.deploy.requests import Direct, Envelope, RequestChannel
from splitft.deploy.server.inbox import Fault, Inbox
from splitft.errors import WireError
from splitft.protocol import (
    Activations,
    EndSession,
    Evaluate,
    GlobalAdapters,
    Join,
    Next,
    Refused,
    RoundStart,
    Stop,
    Train,
    Wait,
)
from splitft.protocol.frame import Frame

CUTS = [1, 2, 3]
TRAINING = {"rounds": 2, "steps": 3}
EVIL = "client-2"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


class Hand:
    """A site played by hand: a real client, which says what a test wants at one point."""

    def __init__(self, inbox, prepared):
        self.terms, self.inbox = prepared.serializer, inbox
        self.client = next(client for client in prepared.clients if client.name == EVIL)
        self.channel = RequestChannel(Direct(EVIL, inbox.answer), KEY, 0, LIMIT)
        self.refusals = []

    def ask(self, message):
        return self.ask_bytes(self.terms.to_bytes(message))

    def ask_bytes(self, frame):
        answer = self.terms.from_bytes(self.channel.ask(frame, 20))
        if isinstance(answer, Refused):
            self.refusals.append(answer)
        return answer

    def play(self, misdeed, at):
        """Behave, but for one misdeed in round 1: at the first `step`, its `head`, or the `upload`."""
        order, done = self.ask(hello(EVIL)), False
        while not isinstance(order, EndSession):
            answer = None
            if isinstance(order, Join):
                self.client.join(order, {})
                order = Next(client=EVIL)
            elif isinstance(order, RoundStart):
                order = self.client.start(order)
            elif isinstance(order, Train):
                for number in range(order.steps):
                    activations = self.client.forward()
                    if not done and at == "step":
                        done = True
                        answer = misdeed(self, activations)
                        break
                    gradient = self.client.head(self.ask(activations))
                    if not done and at == "head" and number == 1:
                        done = True
                        answer = misdeed(self, gradient)
                        break
                    self.client.backward(self.ask(gradient))
                else:
                    order = self.client.upload()
                    if not done and at == "upload":
                        done = True
                        answer = misdeed(self, order)
            elif isinstance(order, GlobalAdapters):
                self.client.install(order)
                order = Next(client=EVIL)
            elif isinstance(order, Evaluate):
                for index in range(len(self.client.held_out)):
                    self.client.held_out.head(self.ask(self.client.held_out.forward(index)))
                order = self.client.held_out.result()
            else:
                assert isinstance(order, Wait | Stop | Refused)
                order = Next(client=EVIL)
            order = self.ask(order) if answer is None else answer


def sends(**change):
    """A misdeed: the message's frame with other fields or tensors, as only who writes frames by hand can."""

    def misdeed(hand, message):
        frame = hand.terms.pack(message)
        fields, tensors = dict(frame.fields), dict(frame.tensors)
        for name, given in change.items():
            value = given(message) if callable(given) else given
            if isinstance(value, torch.Tensor):
                tensors[name] = encoded(message.ROLES[name], value)
            elif isinstance(value, AdapterState):
                tensors = {f"{name}/{key}": encoded("adapter", one) for key, one in value.tensors().items()}
            else:
                fields[name] = value
        return hand.ask_bytes(Frame(frame.kind, fields, tensors).to_bytes())

    return misdeed


def encoded(role, tensor):
    codec = "raw" if role == "label" else "fp64"
    return Encoded(role, codec, tensor.dtype, tuple(tensor.shape), {"": tensor.contiguous()})


def raw(make):
    """A misdeed: bytes in place of the message's frame."""

    def misdeed(hand, message):
        return hand.ask_bytes(make(hand.terms.to_bytes(message)))

    return misdeed


def spoilt(value):
    def make(message):
        tensor = message.hidden.clone() if isinstance(message, Activations) else message.gradient.clone()
        tensor[0, 0] = value
        return tensor

    return make


def declaring(nbytes):
    """The frame with another length of its body in the prefix."""
    place = struct.calcsize("<4sHHI")
    return lambda frame: frame[:place] + struct.pack("<Q", nbytes) + frame[place + 8 :]


def factors(change):
    def make(message):
        return AdapterState({key: change(one) for key, one in message.adapters.items()})

    return make


def first(adapters):
    return next(iter(adapters.values()))


def frame_of(kind):
    return Frame(kind, {}, {}).to_bytes()


LONG = BATCH_TOKENS + 1
MISDEEDS = {
    "NaN in hidden states": ("step", sends(hidden=spoilt(math.nan)), "ProtocolError"),
    "infinity in hidden states": ("step", sends(hidden=spoilt(math.inf)), "ProtocolError"),
    "NaN in a gradient": ("head", sends(gradient=spoilt(math.nan)), "ProtocolError"),
    "another width": ("step", sends(hidden=lambda m: m.hidden[:, :-1]), "ProtocolError"),
    "another type": ("step", sends(hidden=lambda m: m.hidden.float()), "ProtocolError"),
    "fewer rows than it says": ("step", sends(hidden=lambda m: m.hidden[:-1]), "ProtocolError"),
    "a step that is not due": ("step", sends(step=7), "ProtocolError"),
    "a round that is not due": ("step", sends(round=9), "ProtocolError"),
    "another client's name": ("step", sends(client="client-1"), "ProtocolError"),
    "nobody's name": ("step", sends(client="client-9"), "ProtocolError"),
    "a held-out batch in training": ("step", sends(training=False), "ProtocolError"),
    "labels that may not travel": (
        "step",
        sends(labels=lambda m: torch.zeros(m.labelled_tokens, dtype=torch.int64)),
        "ProtocolError",
    ),
    "a larger batch than agreed": (
        "step",
        sends(lengths=[LONG], labelled=[[0, 1]], hidden=torch.zeros(LONG, 32).double()),
        "ProtocolError",
    ),
    "a gradient of another batch": ("head", sends(gradient=lambda m: m.gradient[:1]), "ProtocolError"),
    "a gradient of an earlier step": ("head", sends(step=0), "ProtocolError"),
    "a message only a server sends": ("step", raw(lambda frame: frame_of("Wait")), "ProtocolError"),
    "10 GB declared": ("step", raw(declaring(10 * 2**30)), "WireError"),
    "a frame cut short": ("step", raw(lambda frame: frame[:-5]), "WireError"),
    "bytes that are no frame": ("step", raw(lambda frame: b"\x80\x04pickle" + frame), "WireError"),
    "a kind nobody knows": ("step", raw(lambda frame: frame_of("Attack")), "ProtocolError"),
    "a changed header": ("step", raw(lambda frame: frame.replace(b'"step"', b'"stop"')), "WireError"),
    "NaN in factors": (
        "upload",
        sends(adapters=factors(lambda one: Factors(one.A * math.nan, one.B))),
        "ProtocolError",
    ),
    "factors of another rank": (
        "upload",
        sends(adapters=factors(lambda one: Factors(one.A[:1], one.B[:, :1]))),
        "AdapterError",
    ),
    "factors of a block it has not": (
        "upload",
        sends(adapters=lambda m: AdapterState({**m.adapters, (3, "self_attn.q_proj"): first(m.adapters)})),
        "AdapterError",
    ),
    "no factors": ("upload", sends(adapters=AdapterState()), "AdapterError"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISDEEDS)
def test_a_misdeed_is_refused_by_name_and_costs_its_sender_the_round_and_nobody_else(tiny_llama, text, name):
    at, misdeed, error = MISDEEDS[name]
    hands = []

    def play_evil(inbox, prepared):
        hands.append(Hand(inbox, prepared))
        hands[0].play(misdeed, at)

    prepared = federation(tiny_llama, text, CUTS, training=TRAINING)
    outcome = deployed(prepared, spec=SPEC, impostors={EVIL: play_evil})
    assert outcome.error is None
    assert outcome.states(EVIL) == ["refused", "back"], outcome.reasons(EVIL)
    assert outcome.reasons(EVIL).startswith(error)
    assert not [event for event in outcome.of("SiteChanged") if event.site != EVIL]
    assert outcome.participants() == [("client-1", "client-3"), ("client-1", "client-2", "client-3")]
    assert outcome.state.adapters.all_finite()
    if at != "upload":  # which is refused by silence: the sender is told with its next order
        assert hands[0].refusals[0].error == error


def test_a_misdeed_changes_nothing_of_what_the_others_learn(tiny_llama, text):
    training, (_, spoil, _) = {"rounds": 1, "steps": 3}, MISDEEDS["NaN in a gradient"]
    outcome = deployed(
        federation(tiny_llama, text, CUTS, training=training),
        impostors={EVIL: lambda inbox, parties: Hand(inbox, parties).play(spoil, "head")},
    )  # fmt: skip
    prepared = federation(tiny_llama, text, CUTS, training=training)
    prepared = type(prepared)(**{
        **prepared.__dict__, "clients": tuple(c for c in prepared.clients if c.name != EVIL),
    })  # fmt: skip
    without, _ = play(prepared, lambda number, cuts: {n: k for n, k in cuts.items() if n != EVIL})
    ours, theirs = outcome.state.adapters.tensors(), without.adapters.tensors()
    assert largest_relative_difference(ours, theirs) < 1e-6


# --- numbers ------------------------------------------------------------------------------------------


@pytest.fixture
def inbox(tiny_llama, text):
    prepared = federation(tiny_llama, text, CUTS, training=TRAINING)
    return Inbox(["client-1", "client-2"], KEY, prepared.serializer, LIMIT, BATCH_TOKENS), prepared.serializer


def answered(inbox, terms, data, site="client-1"):
    return terms.from_bytes(Envelope.from_bytes(inbox.answer(site, data), KEY, LIMIT).frame)


def test_a_message_that_comes_again_gets_the_same_answer_and_is_not_heard_twice(inbox):
    inbox, terms = inbox
    data = Envelope(KEY, 0, 0, terms.to_bytes(hello("client-1"))).to_bytes()
    first = inbox.answer("client-1", data)
    assert inbox.answer("client-1", data) == first
    assert len(inbox.take(0, 0)) == 1


@pytest.mark.parametrize("number", [1, 5, 2**63])
def test_a_number_that_is_not_due_is_refused(inbox, number):
    inbox, terms = inbox
    answer = answered(inbox, terms, Envelope(KEY, 0, number, terms.to_bytes(hello("client-1"))).to_bytes())
    assert (answer.error, isinstance(inbox.take(0, 0)[0], Fault)) == ("RepeatError", True)


def test_an_older_message_played_back_is_refused(inbox):
    inbox, terms = inbox
    ask = [Envelope(KEY, 0, n, terms.to_bytes(Next(client="client-1"))).to_bytes() for n in range(2)]
    for data in ask:
        inbox.answer("client-1", data)
    assert answered(inbox, terms, ask[0]).error == "RepeatError"


def test_another_message_under_a_used_number_is_refused(inbox):
    inbox, terms = inbox
    inbox.answer("client-1", Envelope(KEY, 0, 0, terms.to_bytes(Next(client="client-1"))).to_bytes())
    again = Envelope(KEY, 0, 0, terms.to_bytes(hello("client-1"))).to_bytes()
    assert answered(inbox, terms, again).error == "RepeatError"


def test_a_message_of_another_session_is_refused(inbox):
    inbox, terms = inbox
    data = Envelope(bytes(16), 0, 0, terms.to_bytes(hello("client-1"))).to_bytes()
    assert answered(inbox, terms, data).error == "RepeatError"


def test_who_is_no_site_of_the_run_is_refused(inbox):
    inbox, terms = inbox
    data = Envelope(KEY, 0, 0, terms.to_bytes(hello("client-9"))).to_bytes()
    assert answered(inbox, terms, data, "client-9").error == "ProtocolError"


def test_a_message_over_the_limit_is_refused_before_it_is_read(inbox):
    inbox, terms = inbox
    data = Envelope(KEY, 0, 0, bytes(10 * LIMIT)).to_bytes()
    tracemalloc.start()
    answer = answered(inbox, terms, data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert answer.error == "WireError"
    assert peak < 2 * LIMIT


@pytest.mark.parametrize("length", [0, 1, 31, 32, 100])
def test_bytes_that_are_no_message_are_refused(inbox, length):
    inbox, terms = inbox
    assert answered(inbox, terms, bytes(length)).error in ("WireError", "RepeatError")


def test_a_site_does_not_take_the_answer_to_another_message(inbox):
    inbox, terms = inbox

    class Wrong:
        def ask(self, data, within_s):
            return Envelope(KEY, 0, 3, terms.to_bytes(Wait())).to_bytes()

    with pytest.raises(WireError, match="the answer to message 3 came"):
        RequestChannel(Wrong(), KEY, 0, LIMIT).ask(terms.to_bytes(Next(client="client-1")), 1)


def test_two_threads_that_send_the_same_message_are_answered_alike(inbox):
    inbox, terms = inbox
    data = Envelope(KEY, 0, 0, terms.to_bytes(hello("client-1"))).to_bytes()
    answers: list[bytes] = []

    def ask():
        answers.append(inbox.answer("client-1", data))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(answers)) == 1
    assert len(inbox.take(0, 0)) == 1
