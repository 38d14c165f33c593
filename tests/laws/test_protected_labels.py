"""While labels are protected, nothing that leaves a client depends on them but what has the noise.

A scripted server answers with the same numbers whatever it is sent, to two clients whose hidden states are
the same and whose labels differ. Their frames are compared field by field.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from deploy.network import deployed
from laws.federations import federation, play, write_text
from splitft.data.text import Batch
from splitft.errors import ProtocolError
from splitft.protocol import Activations, CutGradient, GlobalAdapters, LastHidden, Message, RoundStart
from splitft.protocol.frame import Frame
from splitft.run.inputs import gather
from splitft.run.setup import RunSetup, prepare

ROUNDS, STEPS = 2, 3
PROTECTED = {
    "gaussian": {"gradient": {"defence": "gaussian", "noise": 2.0}},
    "laplace": {"gradient": {"defence": "laplace", "noise": 2.0}},
    "randomised": {"labels": {"defence": "randomised", "epsilon": 1.0}},
    "both": {
        "gradient": {"defence": "gaussian", "noise": 2.0},
        "labels": {"defence": "randomised", "epsilon": 1.0},
    },
}
NOISED = {("HeadGradient", "gradient"), ("Evaluation", "loss")}
"""The fields that depend on labels, within the account."""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


class Relabelled(Batch):
    """The same tokens, with other labels."""

    def targets(self) -> torch.Tensor:
        return (super().targets() + 1) % 257

    def divided(self, parts: int) -> tuple[Batch, ...]:
        return tuple(relabelled(one) for one in super().divided(parts))


def relabelled(batch: Batch) -> Relabelled:
    return Relabelled(batch.tokens, batch.lengths, batch.labelled_from, batch.numbers)


@dataclass
class RelabelledStream:
    """A stream of batches with other labels."""

    own: Any

    def batch(self, step: int) -> Batch:
        return relabelled(self.own.batch(step))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


def with_other_labels(prepared: RunSetup) -> RunSetup:
    inputs = gather(prepared.config)
    clients = tuple(
        replace(one, stream=RelabelledStream(one.stream), held_out=tuple(relabelled(b) for b in one.held_out))
        for one in inputs.clients
    )
    return prepare(prepared.config, replace(inputs, clients=clients))


def _answer(sent: Activations, kind: type[Message]) -> Message:
    """The scripted server's reply, which depends on the place in the run and on sizes alone."""
    place = (sent.round * 100 + sent.step) * 10 + sent.micro_batch
    generator = torch.Generator().manual_seed(place)
    field, rows = ("hidden", sent.labelled_tokens) if kind is LastHidden else ("gradient", len(sent.hidden))
    numbers = torch.randn(rows, sent.hidden.shape[1], generator=generator, dtype=sent.hidden.dtype)
    return kind(step=sent.step, micro_batch=sent.micro_batch, **{field: numbers})


def conversation(prepared: RunSetup) -> Iterator[Message]:
    """Every message of the first client over two rounds with the scripted server."""
    client, cut = prepared.clients[0], prepared.clients[0].plan.cut
    sizes = prepared.initial().adapters
    for number in range(1, ROUNDS + 1):
        yield client.start(RoundStart(round=number, cut=cut))
        for _ in range(STEPS):
            first = True
            while first or client.unsent:
                first = False
                sent = client.forward()
                yield sent
                yield client.head(_answer(sent, LastHidden))
                client.backward(_answer(sent, CutGradient))
        yield client.upload()
        own = {key: one for key, one in sizes.items() if key[0] < cut}
        client.install(GlobalAdapters(round=number, adapters=type(sizes)(own)))
        for index in range(len(client.held_out)):
            sent = client.held_out.forward(index)
            yield sent
            client.held_out.head(_answer(sent, LastHidden))
        yield client.held_out.result()


def differing(one: Sequence[Frame], other: Sequence[Frame]) -> set[tuple[str, str]]:
    """The fields, by message, that are not the same to the bit in both."""
    assert [frame.kind for frame in one] == [frame.kind for frame in other]
    found = set()
    for a, b in zip(one, other, strict=True):
        names = a.fields.keys() | b.fields.keys()
        found |= {(a.kind, name) for name in names if a.fields.get(name) != b.fields.get(name)}
        assert a.header.entries == b.header.entries  # names, codecs, types and shapes
        for name, tensor in a.stored.items():
            if not torch.equal(tensor, b.stored[name]):
                found.add((a.kind, name.partition("/")[0]))
    return found


def both(folder, text, privacy: dict[str, Any], **training: int) -> list[list[Frame]]:
    """The frames of two clients that differ in their labels alone."""
    frames = []
    for other in (False, True):
        sections = {"privacy": privacy, "training": {"steps": STEPS, **training}}
        prepared = federation(folder, text, [2], **sections)
        party = with_other_labels(prepared) if other else prepared
        messages = map(party.serializer.to_bytes, conversation(party))
        frames.append([Frame.from_bytes(data) for data in messages])
    return frames


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("defence", PROTECTED)
def test_only_the_noised_fields_of_all_frames_depend_on_labels(tiny_llama, text, defence, parts):
    one, other = both(tiny_llama, text, PROTECTED[defence], micro_batches=parts)
    assert {frame.kind for frame in one} == {
        "RoundReady", "Activations", "HeadGradient", "AdapterUpload", "Evaluation"
    }  # fmt: skip
    assert differing(one, other) == NOISED
    assert not any("loss" in frame.fields for frame in one if frame.kind == "HeadGradient")


def test_without_protection_the_same_comparison_finds_the_exact_losses(tiny_llama, text):
    one, other = both(tiny_llama, text, {})
    assert differing(one, other) == NOISED | {("HeadGradient", "loss"), ("Evaluation", "correct")}


@pytest.mark.parametrize(("privacy", "same"), [(PROTECTED["gaussian"], True), ({}, False)])
def test_the_choice_of_codecs_depends_on_labels_only_if_they_are_not_protected(
    tiny_llama, text, privacy, same
):
    wire = {"hidden": "bf16", "gradient": "auto", "adapter": "fp32"}
    model = {"dtype": "float32"}
    prepared = federation(tiny_llama, text, [2], privacy=privacy, wire=wire, model=model)
    reasons = [[one.reason for one in each.chosen] for each in (prepared, with_other_labels(prepared))]
    assert reasons[0]
    assert (reasons[0] == reasons[1]) == same


def test_a_server_gets_no_second_gradient_of_the_same_labels(tiny_llama, text):
    """The mean of many noisy gradients would have little noise."""
    prepared = federation(tiny_llama, text, [2], privacy=PROTECTED["gaussian"])
    client = prepared.clients[0]
    client.start(RoundStart(round=1, cut=2))
    sent = client.forward()
    client.head(_answer(sent, LastHidden))
    with pytest.raises(ProtocolError, match="LastHidden came twice"):
        client.head(_answer(sent, LastHidden))
    client.backward(_answer(sent, CutGradient))
    assert client.steps == 1


def test_a_client_with_the_whole_model_trains_with_the_same_noise_as_a_split_one(tiny_llama, text):
    """Its adapters leave, so they may depend on labels through the noised gradient only."""
    noise = {"gradient": {"defence": "gaussian", "noise": 2.0, "clip_norm": 1.0}}
    training = {"rounds": 1, "steps": 4}
    states, plain = [], []
    for cut in (2, "whole"):
        for privacy, found in ((noise, states), ({}, plain)):
            prepared = federation(
                tiny_llama, text, [2], privacy=privacy, training=training,
                clients={"count": 1, "cuts": cut, "shares": {"by": "iid"}},
            )  # fmt: skip
            state, events = play(prepared)
            found.append(state.adapters.tensors())
            reported = {event.loss is not None for event in events if event.event == "StepDone"}
            assert reported == {not privacy}
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-6, atol=1e-9)
    assert any(not torch.allclose(states[1][name], plain[1][name]) for name in plain[1])


def test_a_deployed_run_learns_no_training_loss_and_goes_on_without(tiny_llama, text):
    privacy = {"gradient": {"defence": "gaussian", "noise": 0.5}}
    sections = {"privacy": privacy, "training": {"rounds": 2, "steps": 2}}
    simulated, _ = play(federation(tiny_llama, text, [1, 2], **sections))
    outcome = deployed(federation(tiny_llama, text, [1, 2], **sections))
    assert outcome.error is None
    assert {event.loss for event in outcome.of("StepDone")} == {None}
    for name, tensor in simulated.adapters.tensors().items():
        torch.testing.assert_close(outcome.state.adapters.tensors()[name], tensor, rtol=1e-5, atol=1e-8)
    losses = [event.loss for event in outcome.of("Evaluated")]
    assert len(losses) == 3
