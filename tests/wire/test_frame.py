"""Frames: what goes in comes out bit for bit, and no bytes whatever do more than raise WireError."""

from __future__ import annotations

import json
import struct
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import torch as safetensors

from splitft.errors import WireError
from splitft.wire import Frame
from splitft.wire.frame import MAX_HEADER_BYTES

PREFIX = struct.Struct("<4sHHIQ")

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def tensors(draw) -> torch.Tensor:
    """Any type and shape, empty ones too, any bits, contiguous or not."""
    dtype = draw(st.sampled_from((*FLOATS, *INTEGERS, torch.bool)))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    if dtype == torch.bool:
        tensor = torch.rand(shape, generator=generator) < 0.5
    else:
        raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
        tensor = raw.view(dtype).reshape(shape)
    return tensor.transpose(0, -1) if draw(st.booleans()) and tensor.dim() else tensor


def _bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


FRAMES = st.builds(
    Frame,
    kind=st.text(min_size=1, max_size=12),
    fields=st.dictionaries(st.text(max_size=6), JSON, max_size=4),
    tensors=st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"), tensors(), max_size=4
    ),
)


@given(FRAMES)
def test_a_frame_survives_the_wire_bit_for_bit(frame):
    again = Frame.from_bytes(frame.to_bytes())
    assert again.kind == frame.kind
    assert again.fields == frame.fields
    assert again.tensors.keys() == frame.tensors.keys()
    for name, tensor in frame.tensors.items():
        found = again.tensors[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert _bits(found) == _bits(tensor)  # bits, so that NaN equals itself and -0 is not 0


def test_views_of_one_tensor_travel_as_tensors_of_their_own():
    whole = torch.arange(12.0).reshape(4, 3)
    again = Frame.from_bytes(Frame("K", {}, {"top": whole[:2], "bottom": whole[1:], "all": whole}).to_bytes())
    assert torch.equal(again.tensors["top"], whole[:2])
    assert torch.equal(again.tensors["bottom"], whole[1:])


@pytest.fixture(scope="module")
def frame() -> bytes:
    return Frame("Kind", {"step": 3}, {"a": torch.ones(3, 2), "b": torch.arange(4)}).to_bytes()


def test_every_truncation_and_every_extra_byte_is_refused(frame):
    for length in range(len(frame)):
        with pytest.raises(WireError):
            Frame.from_bytes(frame[:length])
    with pytest.raises(WireError, match="torn or padded"):
        Frame.from_bytes(frame + b"\0")


def test_any_flipped_bit_gives_a_frame_or_a_wire_error(frame):
    refused = 0
    for place in range(8 * len(frame)):
        damaged = bytearray(frame)
        damaged[place // 8] ^= 1 << place % 8
        try:
            Frame.from_bytes(bytes(damaged))
        except WireError:
            refused += 1
    assert refused > 8 * PREFIX.size  # the prefix in full, and most of both headers


@given(st.binary(max_size=200))
def test_any_bytes_at_all_are_refused(data):
    with pytest.raises(WireError):
        Frame.from_bytes(data)


@given(header=st.binary(max_size=60), body=st.binary(max_size=60))
def test_any_header_and_body_behind_a_good_prefix_are_refused(header, body):
    with pytest.raises(WireError):
        Frame.from_bytes(PREFIX.pack(b"SPFT", 1, 0, len(header), len(body)) + header + body)


SPOILT = {
    "bad magic": ((b"PICK", 1, 0, 2, 2), "not from splitft"),
    "another version": ((b"SPFT", 2, 0, 2, 2), "version 2.*update the older side"),
    "reserved bits": ((b"SPFT", 1, 7, 2, 2), "prefix is damaged"),
    "a body of 10 GB": ((b"SPFT", 1, 0, 2, 10 * 10**9), "declares 100000000"),
    "the largest body": ((b"SPFT", 1, 0, 2, 2**64 - 1), "torn or padded"),
    "a huge header": ((b"SPFT", 1, 0, MAX_HEADER_BYTES + 1, 2), "header of 1048577 bytes"),
}


@pytest.mark.parametrize(("prefix", "message"), SPOILT.values(), ids=SPOILT)
def test_a_prefix_that_promises_what_is_not_there_is_refused_without_allocating(prefix, message):
    tracemalloc.start()
    with pytest.raises(WireError, match=message):
        Frame.from_bytes(PREFIX.pack(*prefix) + b"{}" + b"{}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_a_frame_over_the_limit_is_not_even_looked_at():
    with pytest.raises(WireError, match="over the limit of 100"):
        Frame.from_bytes(b"\0" * 101, limit=100)


@pytest.mark.parametrize(
    "header",
    [
        b"", b"{", b"[]", b"3", b'"x"', b"\xff\xfe", b'{"kind":"K"}', b'{"kind":3,"fields":{}}',
        b'{"kind":"K","fields":[]}', b'{"kind":"K","fields":{},"more":1}', b"[" * 100_000, b"1" * 10_000,
    ],
    ids=lambda header: repr(header[:12]),
)  # fmt: skip
def test_a_header_that_is_not_a_kind_with_fields_is_refused(header):
    body = safetensors.save({})
    with pytest.raises(WireError, match="the frame's header is not"):
        Frame.from_bytes(PREFIX.pack(b"SPFT", 1, 0, len(header), len(body)) + header + body)


def _with_body(table: object, data: bytes = b"") -> bytes:
    header, text = b'{"kind":"K","fields":{}}', json.dumps(table).encode()
    body = struct.pack("<Q", len(text)) + text + data
    return PREFIX.pack(b"SPFT", 1, 0, len(header), len(body)) + header + body


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2500000000], "data_offsets": [0, 10**10]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2**62, 0], "data_offsets": [0, 0]},
        {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]},
        {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]},
        {"dtype": "F6_E2M3", "shape": [32], "data_offsets": [0, 24]},
        {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]},
    ],
    ids=str,
)
def test_a_tensor_table_that_lies_gives_a_wire_error_and_no_allocation(entry):
    end = entry["data_offsets"][1]
    frame = _with_body({"x": entry}, b"\0" * (end if end < 100 else 8))
    try:
        tensor = Frame.from_bytes(frame).tensors["x"]
    except WireError:
        return
    assert tensor.numel() * tensor.dtype.itemsize <= 24  # a type that we do not send, but no lie


def test_a_header_too_long_to_be_read_is_not_sent():
    with pytest.raises(WireError, match="is over 1048576"):
        Frame("K", {"x": "y" * MAX_HEADER_BYTES}, {}).to_bytes()
