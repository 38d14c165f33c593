"""Each side of a deployed run may compute in a type of its own; a frame carries the sender's."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from protocol.test_messages import EXACT, LAST, UPLOAD
from splitft.errors import ProtocolError
from splitft.protocol.codec_state import CodecState
from splitft.protocol.frame import open_frame
from splitft.specs import WireSpec

TYPES = frozenset({torch.bfloat16, torch.float32})
WIRES = ("fp32", "bf16", "int8", "temporal")


def _side(dtype: torch.dtype, hidden: str = "fp32", others=TYPES):
    wire = WireSpec(hidden=hidden, gradient="fp32")
    return dataclasses.replace(EXACT, dtype=dtype, wire=wire, other_types=others)


@pytest.mark.parametrize("hidden", WIRES)
@pytest.mark.parametrize(
    ("sender", "receiver"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
def test_a_message_arrives_in_the_receivers_type_with_the_senders_numbers(sender, receiver, hidden):
    one, other = _side(sender, hidden), _side(receiver, hidden)
    message = LAST.model_copy(update={"hidden": LAST.hidden.to(sender)})
    ends = {side: CodecState(0, "ann") for side in ("sender", "receiver")}
    data = one.to_bytes(message, ends["sender"])
    assert open_frame(data).entries["hidden"].dtype == sender
    arrived = other.from_bytes(data, state=ends["receiver"]).hidden
    assert arrived.dtype == receiver
    as_sent = one.rounded(message).hidden
    torch.testing.assert_close(arrived, as_sent.to(receiver), rtol=2**-8, atol=0)
    for key, kept in ends["sender"].tensors().items():  # codecs with a memory have the same on both sides
        assert torch.equal(kept, ends["receiver"].tensors()[key])


def test_the_check_before_the_payload_sees_the_receivers_type():
    def refuse(outline):
        assert (outline.hidden.device.type, outline.hidden.dtype) == ("meta", torch.float32)
        raise ProtocolError("not now")

    message = LAST.model_copy(update={"hidden": LAST.hidden.bfloat16()})
    with pytest.raises(ProtocolError, match="not now"):
        _side(torch.float32).from_bytes(_side(torch.bfloat16).to_bytes(message), check=refuse)


@pytest.mark.parametrize(
    ("dtype", "others"),
    [(torch.bfloat16, frozenset()), (torch.float64, TYPES)],
    ids=["no other type", "a type of its own"],
)
def test_a_type_that_nobody_may_have_is_refused(dtype, others):
    message = LAST.model_copy(update={"hidden": LAST.hidden.to(dtype)})
    data = _side(dtype, "fp32").to_bytes(message)
    with pytest.raises(ProtocolError, match=f"comes as {dtype}; agreed was torch.float32"):
        _side(torch.float32, "fp32", others).from_bytes(data)


def test_factors_have_one_type_on_all_sides():
    narrow = dataclasses.replace(_side(torch.bfloat16), adapter_dtype=torch.bfloat16)
    with pytest.raises(ProtocolError, match=r"comes as torch.bfloat16; agreed was torch.float32"):
        _side(torch.float32).from_bytes(narrow.to_bytes(UPLOAD))
