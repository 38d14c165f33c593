"""Codecs on a device: the bits of the CPU, and only encoded bytes cross, in one copy each way."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from accelerator import FIRST, SECOND
from laws.federations import federation, write_text
from splitft.codecs import CODECS, CodecContext, codec_of, place_to_decode, place_to_encode
from splitft.protocol import HeadGradient, LastHidden, MessageSerializer
from splitft.protocol.frame import Frame
from splitft.protocol.serializer import always
from splitft.specs import WireSpec
from splitft.tracking.events import StepDone

CPU = torch.device("cpu")
SHAPES = [(), (0, 3), (1, 1), (2, 3, 4), (5, 64), (3, 100), (9, 576)]
HERE = [name for name, kind in CODECS.items() if kind.on_device]
ELSEWHERE = [name for name, kind in CODECS.items() if not kind.on_device]


def _rows(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(3).to(dtype)


def test_the_casts_and_the_plain_quantizers_compute_on_devices():
    assert HERE == ["fp64", "fp32", "bf16", "fp8", "int8", "int4"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("role", ["hidden", "gradient"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", HERE)
def test_a_device_encodes_and_decodes_to_the_bits_of_the_cpu(name, shape, role, dtype, fake_devices):
    codec, context, x, bits = codec_of(name), CodecContext(role, 5), _rows(shape, dtype), []
    wanted = codec.encode(x, context)
    there = codec.encode(x.to(FIRST), context)
    assert {part.device for part in there.parts.values()} == {FIRST}
    found = there.to(CPU)
    assert (found.parameters, found.entry) == (wanted.parameters, wanted.entry)
    for one in (found, wanted):
        bits.append([part.reshape(-1).view(torch.uint8).tolist() for part in one.parts.values()])
    assert bits[0] == bits[1]
    decoded = codec.decode(found.to(SECOND), dtype, context)
    assert (decoded.device, decoded.dtype, decoded.shape) == (SECOND, dtype, x.shape)
    assert torch.equal(decoded.cpu(), codec.decode(wanted, dtype, context))


@pytest.mark.parametrize("name", HERE)
def test_what_is_encoded_crosses_in_one_copy(name, fake_devices):
    context = CodecContext("hidden")
    there = codec_of(name).encode(_rows((9, 128)).to(FIRST), context)
    fake_devices.copies.clear()
    fake_devices.nbytes.clear()
    here = there.to(CPU)
    assert here.to(CPU) is here
    here.to(SECOND)
    assert fake_devices.copies == {"from": 1, "to": 1}
    assert fake_devices.nbytes == {"from": here.nbytes, "to": here.nbytes}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_other_codecs_have_their_tensors_on_the_cpu(name, fake_devices):
    codec, context, x = codec_of(name), CodecContext("hidden", 0, {}, [(0, 9)]), _rows((9, 128))
    assert place_to_encode(codec, x.to(FIRST), context).device == CPU
    encoded = codec.encode(x, context)
    assert place_to_decode(codec, encoded, torch.float32, FIRST) is encoded


def test_a_type_that_a_device_lacks_is_made_on_the_cpu():
    assert CODECS["int8"].runs_on("mps")
    assert not CODECS["fp8"].runs_on("mps")
    assert CODECS["fp8"].runs_on("cpu")


CROSSING = {
    # (wire, type of the model): where hidden states and gradients are encoded; what is smaller crosses
    ("bf16", torch.float32): ("device", "device"),
    ("fp32", torch.float32): ("cpu", "cpu"),
    ("fp32", torch.bfloat16): ("cpu", "cpu"),
    ("fp8", torch.bfloat16): ("device", "device"),
    ("int8", torch.float32): ("device", "cpu"),  # the numbers drawn for a gradient would be as large as it
    ("int4", torch.bfloat16): ("device", "cpu"),
    ("topk", torch.float32): ("cpu", "cpu"),
}


@pytest.mark.parametrize("kind", [LastHidden, HeadGradient])
@pytest.mark.parametrize(("wire", "dtype"), CROSSING, ids=str)
def test_a_message_crosses_as_what_is_smaller(wire, dtype, kind, fake_devices):
    serializer = MessageSerializer(128, dtype, torch.float32, WireSpec(hidden=wire, gradient=wire))
    rows, gradient = _rows((9, 128), dtype), kind is HeadGradient

    def message(tensor):
        named = {"client": "a", "round": 1, "gradient": tensor} if gradient else {"hidden": tensor}
        return kind(step=0, **named)

    there, plain = message(rows.to(FIRST)), serializer.pack(message(rows))
    for _ in range(2):  # the rotation and the steps of a scale are copied to a device once
        fake_devices.nbytes.clear()
        fake_devices.copies.clear()
        frame = serializer.pack(there)
        arrived = serializer.from_bytes(frame.to_bytes(), place=always(SECOND))
    nbytes, copies = dict(fake_devices.nbytes), dict(fake_devices.copies)
    role = "gradient" if gradient else "hidden"
    payload, numbers = frame.tensors[role].nbytes, getattr(arrived, role)
    assert frame.to_bytes() == plain.to_bytes()
    assert torch.equal(numbers.cpu(), getattr(serializer.unpack(plain), role))
    # from the sender's device, to the receiver's
    crossing = {"from": payload if CROSSING[wire, dtype][gradient] == "device" else rows.nbytes}
    if CODECS[wire].on_device and payload < rows.nbytes:
        crossing["to"] = payload
    assert numbers.device == (SECOND if "to" in crossing else CPU)
    assert nbytes == crossing
    assert copies == dict.fromkeys(crossing, 1)


@pytest.mark.parametrize("codec", ["bf16", "fp8", "int8", "int4"])
def test_of_hidden_states_and_gradients_their_encoded_bytes_cross(codec, tiny_llama, tmp_path, fake_devices):
    """In a step of one client, but for the draws of integers: their gradients are encoded on the CPU."""
    text = write_text(tmp_path / "notes.jsonl")
    prepared = federation(
        tiny_llama, text, [2], model={"dtype": "float32"}, training={"rounds": 1, "steps": 3},
        wire={"hidden": codec, "gradient": codec, "adapter": "fp32"},
        devices={"server": "acc:0", "clients": "acc:1"},
    )  # fmt: skip
    frames, crossed = [], []

    def listener(event):
        if isinstance(event, StepDone):
            tensors = [e for frame in frames for e in frame.tensors.values() if e.role != "adapter"]
            crossed.append((Counter(fake_devices.nbytes), Counter(fake_devices.copies), tensors))
        frames.clear()

    def tap(name, direction, data):
        frames.append(Frame.from_bytes(data))

    prepared.trainer(prepared.simulation(tap), listener).train(prepared.initial())
    (_, before, _), (start, copies, _), (end, copies_after, tensors) = crossed
    assert [tensor.role for tensor in tensors] == ["hidden", "hidden", "gradient", "gradient"]
    drawn = CODECS[codec].draws_gradients
    of_gradients = sum(4 * math.prod(one.shape) if drawn else one.nbytes for one in tensors[2:])
    encoded = sum(one.nbytes for one in tensors)
    tokens = prepared.clients[0].setup.stream.batch(2).tokens.nbytes
    loss = 4
    assert (end - start)["from"] == sum(one.nbytes for one in tensors[:2]) + of_gradients + loss
    assert (end - start)["to"] == encoded + tokens
    assert copies_after - copies == copies - before == {"from": 5, "to": 5}, "messages, tokens, the loss"
