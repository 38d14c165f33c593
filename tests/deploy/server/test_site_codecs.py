"""A site tries and chooses codecs when it is asked to, within bounds, and on nothing but held-out text."""

from __future__ import annotations

import pytest
import torch

from splitft.deploy.server.claims import SiteLimits
from splitft.deploy.server.site_codecs import MOST_TRIALS, SiteCodecs, TrialCount
from splitft.errors import ProtocolError
from splitft.protocol import Activations, CodecsChosen, LastHidden, MessageSerializer, TryCodec
from splitft.protocol.serializer import ON_THE_CPU
from splitft.run.codec_choice import with_codecs
from splitft.specs import WireSpec

TERMS = MessageSerializer(8, torch.float32, torch.float32, WireSpec(hidden="auto", gradient="auto"))
TRIAL = TryCodec(client="a", hidden="int8")
CHOICE = CodecsChosen(client="a", hidden="int4", gradient="int8", reason="fits")


def batch(step: int = 0, sequences: int = 2, training: bool = False) -> Activations:
    return Activations(
        client="a", round=0, step=step, training=training, lengths=(3,) * sequences,
        labelled=((1, 2),) * sequences, hidden=torch.ones(3 * sequences, 8),
    )  # fmt: skip


def received(codecs: SiteCodecs, frame: bytes, choosing: bool = True):
    return codecs.receive(frame, 10**6, lambda outline: None, ON_THE_CPU, choosing).message


@pytest.mark.parametrize("message", [TRIAL, CHOICE], ids=["TryCodec", "CodecsChosen"])
@pytest.mark.fault("a site changes its codecs without having been asked", "it is refused; its codecs stay")
def test_a_site_that_was_not_asked_keeps_its_codecs(message):
    codecs = SiteCodecs(TERMS, 0, "a")
    codecs.use("int4", "int4")
    with pytest.raises(ProtocolError, match="was not asked to choose its codecs"):
        received(codecs, TERMS.to_bytes(message), choosing=False)
    assert received(codecs, with_codecs(TERMS, "int4", "int4").to_bytes(batch())).hidden.shape == (6, 8)


def test_messages_come_and_go_in_the_codec_that_is_tried_and_then_chosen():
    codecs = SiteCodecs(TERMS, 0, "a")
    for message, hidden in ((TRIAL, "int8"), (CHOICE, "int4")):
        received(codecs, TERMS.to_bytes(message))
        received(codecs, with_codecs(TERMS, hidden, "fp32").to_bytes(batch()))
        reply = codecs.pack(LastHidden(step=0, hidden=torch.ones(2, 8)))
        assert [one.codec for one in reply.tensors.values()] == [hidden]


def test_a_codec_of_no_candidate_is_refused():
    with pytest.raises(ProtocolError, match="cannot be tried"):
        received(SiteCodecs(TERMS, 0, "a"), TERMS.to_bytes(TryCodec(client="a", hidden="topk")))


def test_a_site_tries_codecs_on_its_held_out_text_alone_and_not_for_ever():
    count, limits = TrialCount(), SiteLimits(longest=8, examples=9, tokens=99, held_out=4)
    for _ in range(MOST_TRIALS):
        for step in (1, 0):  # in any order
            count.check(batch(step), 0, limits)
            count.add(batch(step))
    with pytest.raises(ProtocolError, match=r"tries codecs on .* it registered 4"):
        count.check(batch(), 0, limits)
    with pytest.raises(ProtocolError, match="round"):
        TrialCount().check(batch(), 3, limits)
