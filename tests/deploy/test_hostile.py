"""Invalid messages of a site are refused by name before anything is allocated, and affect no other site."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from deploy.network import BATCH_TOKENS, KEY, LIMIT, SPEC, deployed, registration
from laws.federations import federation, largest_relative_difference, play, write_text
from splitft.adapters import AdapterState, Factors
from splitft.codecs import Encoded
from splitft.deploy.requests import Direct, RequestChannel
from splitft.protocol import (
    Activations,
    EndSession,
    Evaluate,
    GlobalAdapters,
    HeadGradient,
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
        self.serializer = prepared.serializer
        self.client = next(client for client in prepared.clients if client.name == EVIL)
        self.channel = RequestChannel(Direct(EVIL, inbox.answer), KEY, 0, LIMIT)
        self.refusals = []

    def ask(self, message):
        return self.ask_bytes(self.serializer.to_bytes(message))

    def ask_bytes(self, frame):
        answer = self.serializer.from_bytes(self.channel.ask(frame, 20))
        if isinstance(answer, Refused):
            self.refusals.append(answer)
        return answer

    def play(self, misdeed, at):
        """Behave, but for one misdeed in round 1.

        It is at the start (`ready`), in place of all steps (`train`), at the first `step`, at a `head`, or at
        the `upload`; or in the first `evaluation`.
        """
        order, done = self.ask(registration(EVIL)), False
        while not isinstance(order, EndSession):
            answer = None
            if isinstance(order, Join):
                self.client.join(order, {})
                order = Next(client=EVIL)
            elif isinstance(order, RoundStart):
                order = self.client.start(order)
                if not done and at == "ready":
                    done = True
                    answer = misdeed(self, order)
            elif isinstance(order, Train) and not done and at == "train":
                done = True
                answer = misdeed(self, order)
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
            elif isinstance(order, Evaluate) and not done and at == "evaluation":
                done = True
                answer = misdeed(self, order)
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
        frame = hand.serializer.pack(message)
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
        return hand.ask_bytes(make(hand.serializer.to_bytes(message)))

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


def steps(count):
    """A misdeed: so many steps, whatever was ordered."""

    def misdeed(hand, order):
        for _ in range(count):
            reply = hand.ask(hand.client.forward())
            if isinstance(reply, Refused):
                return reply
            hand.client.backward(hand.ask(hand.client.head(reply)))
        return hand.ask(hand.client.upload())

    return misdeed


def moments(**fields):
    """A misdeed: moments of a block with its answer to the start of a round."""

    def misdeed(hand, message):
        named = {f"0.self_attn.q_proj.A.{field}": tensor for field, tensor in fields.items()}
        return hand.ask(message.model_copy(update={"moments": named}))

    return misdeed


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
    "more steps than were ordered": ("train", steps(56), "ProtocolError"),
    "a registration in the middle of an order": (
        "train", lambda hand, order: hand.ask(registration(EVIL)), "ProtocolError",
    ),
    "no step at all": ("train", steps(0), "ProtocolError"),
    "more sequences than a batch has": (
        "step",
        sends(lengths=[2] * 9, labelled=[[0, 1]] * 9, hidden=torch.zeros(18, 32).double()),
        "ProtocolError",
    ),
    "a label at the last token": (
        "step",
        sends(labelled=lambda m: [[length - 1, length] for length in m.lengths]),
        "ProtocolError",
    ),
    "more parts than were agreed": (
        "step",
        sends(micro_batches=2, step_labelled=lambda m: m.labelled_tokens + 10**6),
        "ProtocolError",
    ),
    "numbers of examples": ("step", sends(examples=lambda m: [7] * len(m.lengths)), "ProtocolError"),
    "a loss that no batch has": ("head", sends(loss=1.7e308), "ProtocolError"),
    "tokens of its own counting": ("upload", sends(tokens=10**9), "ProtocolError"),
    "factors that overflow": (
        "upload",
        sends(adapters=factors(lambda one: Factors(one.A * 1e200, one.B))),
        "AdapterError",
    ),
    "moments that nobody keeps": ("ready", moments(step=torch.tensor(1.0)), "ProtocolError"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISDEEDS)
@pytest.mark.hostile("a site sends {name}", "refused; out for the round, and back in the next")
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
    silent = ("no step at all", "a registration in the middle of an order")
    if at not in ("ready", "upload") and name not in silent:  # the sender is told with its next order
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


def whole_evaluation(hand):
    for index in range(len(hand.client.held_out)):
        hand.client.held_out.head(hand.ask(hand.client.held_out.forward(index)))
    return hand.client.held_out.result()


def claims(**fields):
    """A misdeed: an honest evaluation, reported with other numbers."""
    return lambda hand, order: hand.ask(whole_evaluation(hand).model_copy(update=fields))


def the_first_batch_twice(hand, order):
    for _ in range(2):
        reply = hand.ask(hand.client.held_out.forward(0))
    return reply


EVALUATIONS = {
    "more tokens than it sent": claims(tokens=10**9),
    "fewer tokens than it sent": claims(tokens=1),
    "a loss that no text has": claims(loss=1.7e308),
    "no batch": lambda hand, order: hand.ask(hand.client.held_out.result()),
    "a batch twice": the_first_batch_twice,
}


@pytest.mark.parametrize("name", EVALUATIONS)
@pytest.mark.hostile("a site evaluates falsely: {name}", "refused; its loss does not count")
def test_a_false_evaluation_is_refused_and_has_no_part_in_the_losses(tiny_llama, text, name):
    prepared = federation(tiny_llama, text, CUTS, training={"rounds": 1, "steps": 1})
    outcome = deployed(
        prepared,
        impostors={EVIL: lambda inbox, parties: Hand(inbox, parties).play(EVALUATIONS[name], "evaluation")},
    )
    assert outcome.error is None
    assert outcome.states(EVIL) == ["refused", "back"], outcome.reasons(EVIL)
    assert outcome.reasons(EVIL).startswith("ProtocolError")
    before, after = outcome.of("Evaluated")
    assert before.by_client.keys() == {"client-1", "client-3"}
    assert after.by_client.keys() == {"client-1", "client-2", "client-3"}
    assert math.isfinite(before.loss)


@pytest.mark.hostile("a site takes 1 step of 3", "it weighs what it has trained on")
def test_a_site_that_takes_fewer_steps_than_ordered_weighs_what_it_has_trained_on(tiny_llama, text):
    prepared = federation(tiny_llama, text, CUTS, training={"rounds": 1, "steps": 3})
    trained, weights = prepared.server.trained, {}

    def counted(client):
        weights[client] = trained(client)[1]
        return trained(client)

    prepared.server.trained = counted
    outcome = deployed(
        prepared, impostors={EVIL: lambda inbox, parties: Hand(inbox, parties).play(steps(1), "train")}
    )
    assert outcome.error is None
    assert outcome.participants() == [("client-1", "client-2", "client-3")]
    counts = {
        name: [step.tokens for step in outcome.of("StepDone") if step.client == name] for name in weights
    }
    assert [len(counts[name]) for name in sorted(counts)] == [3, 1, 3]
    assert weights == {name: sum(tokens) for name, tokens in counts.items()}


@pytest.mark.hostile("a site sends parts as large as a batch", "refused; out for the round")
def test_parts_of_a_step_are_together_no_larger_than_a_batch(tiny_llama, text):
    """Each part as large as a whole batch would give a site so many times its weight."""
    training = {"rounds": 1, "steps": 2, "micro_batches": 3, "in_flight": 1, "batch_size": 3}
    seen = []

    def large_parts(hand, order):
        for number in range(3):
            activations = hand.client.forward()
            lengths, count = (4, 4), 6
            message = activations.model_copy(update={
                "lengths": lengths, "labelled": ((0, 1), (0, 1)), "micro_batch": number, "micro_batches": 3,
                "step_labelled": count, "hidden": torch.zeros(8, 32).double(),
            })  # fmt: skip
            reply = hand.ask(message)
            seen.append(type(reply).__name__)
            if isinstance(reply, Refused):
                return reply
            gradient = torch.zeros(2, 32).double()
            hand.ask(
                HeadGradient(client=EVIL, round=1, step=0, micro_batch=number, loss=1.0, gradient=gradient)
            )
            del hand.client._sent[number]
        return reply

    outcome = deployed(
        federation(tiny_llama, text, CUTS, training=training),
        impostors={EVIL: lambda inbox, parties: Hand(inbox, parties).play(large_parts, "train")},
    )
    assert outcome.error is None
    assert "sends a step of 4 sequences; training.batch_size is 3" in outcome.reasons(EVIL)
    assert seen == ["LastHidden", "Refused"]
    assert outcome.participants() == [("client-1", "client-3")]
