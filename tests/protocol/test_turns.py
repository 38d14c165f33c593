"""Codecs that remember at both ends refuse what they cannot follow, and begin anew with the same message."""

from __future__ import annotations

import pytest
import torch

from splitft.adapters import AdapterState
from splitft.errors import WireError
from splitft.protocol import Activations, CodecsChosen, Join, MessageSerializer, RoundStart, TryCodec
from splitft.protocol.codec_state import CodecState
from splitft.specs import WireSpec

WIDTH = 16
CODECS = ["temporal", "principal:bits=3"]


class Line:
    """The two ends of one client's connection."""

    def __init__(self, codec: str) -> None:
        wire = WireSpec(hidden=codec, gradient="fp32")
        self.terms = MessageSerializer(WIDTH, torch.float32, torch.float32, wire)
        self.client, self.server = CodecState(0, "a"), CodecState(0, "a")

    def up(self, message):
        return self.terms.from_bytes(self.terms.to_bytes(message, self.client), state=self.server)

    def down(self, message):
        return self.terms.from_bytes(self.terms.to_bytes(message, self.server), state=self.client)


def batch(step: int, training: bool = True) -> Activations:
    """Forty rows of one example, which change a little from step to step."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(40, WIDTH, generator=generator) * torch.linspace(0.1, 3, WIDTH)
    hidden = rows + 0.1 * step * torch.randn(40, WIDTH, generator=generator)
    return Activations(
        client="a", round=1, step=step, training=training, lengths=(40,), labelled=((1, 39),), examples=(3,),
        hidden=hidden,
    )  # fmt: skip


def anew(codec: str, *steps: int) -> torch.Tensor:
    """What arrives of the last step where nothing came before these."""
    line = Line(codec)
    return [line.up(batch(step)).hidden for step in steps][-1]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("forgetful", ["client", "server"])
@pytest.mark.fault("one end of a channel forgets what codec {codec} has learned", "the next frame is refused")
def test_an_end_that_has_forgotten_alone_refuses_and_is_refused(codec, forgetful):
    line = Line(codec)
    for step in range(3):
        line.up(batch(step))
    getattr(line, forgetful).restart()
    with pytest.raises(WireError, match=r"goes on from \d tensors at the sender, \d here"):
        line.up(batch(3))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "message",
    [Join(round=1, cut=1, steps=3), RoundStart(round=2, cut=2, adapters=AdapterState())],
    ids=["Join", "move"],
)
def test_both_ends_begin_anew_with_the_same_message(codec, message):
    line = Line(codec)
    for step in range(3):
        line.up(batch(step))
    line.down(RoundStart(round=1, cut=1, adapters=AdapterState()))
    line.up(batch(3))
    assert not torch.equal(line.up(batch(4)).hidden, anew(codec, 4))  # it has learned from those before
    line.down(message)
    assert torch.equal(line.up(batch(4)).hidden, anew(codec, 4))


@pytest.mark.parametrize("codec", CODECS)
def test_a_message_that_forgot_at_one_end_is_made_good_by_the_next_join(codec):
    line = Line(codec)
    line.up(batch(0))
    line.client.restart()
    with pytest.raises(WireError):
        line.up(batch(1))
    line.down(Join(round=1, cut=1, steps=0))
    assert torch.equal(line.up(batch(1)).hidden, anew(codec, 1))


@pytest.mark.parametrize("codec", CODECS)
def test_held_out_batches_have_turns_of_their_own(codec):
    line = Line(codec)
    line.up(batch(0))
    line.up(batch(0, training=False))
    assert torch.equal(line.up(batch(1)).hidden, anew(codec, 0, 1))


@pytest.mark.parametrize("codec", CODECS)
def test_turns_are_kept_in_checkpoints(codec):
    line = Line(codec)
    for step in range(2):  # too few for principal axes: only the sender has a memory
        line.up(batch(step))
    line.client.restore(line.client.tensors())
    line.server.restore(line.server.tensors())
    line.up(batch(2))
    assert line.client.coded("Activations") == line.server.coded("Activations") == 3


def test_a_frame_of_a_sender_that_counts_nothing_is_read():
    line = Line("temporal")
    frame = line.terms.pack(batch(0), line.client)
    (encoded,) = frame.tensors.values()
    encoded.parameters.pop("turn")
    assert line.terms.unpack(frame, line.server).hidden.shape == (40, WIDTH)


@pytest.mark.parametrize(
    "message",
    [
        TryCodec(client="a", hidden="int4"),
        CodecsChosen(client="a", hidden="int4", gradient="int8", reason=""),
    ],
    ids=["TryCodec", "CodecsChosen"],
)
def test_trials_begin_anew(message):
    line = Line("temporal")
    line.up(batch(0))
    line.up(message)
    assert line.client.tensors() == line.server.tensors() == {}
