"""Frames: what goes in comes out bit for bit, and no bytes whatever do more than raise WireError."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import torch as safetensors

from splitft.codecs import Encoded
from splitft.errors import WireError
from splitft.protocol.frame import MAX_HEADER_BYTES, SEALED, VERSION, Frame, open_frame, seal

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=4,  # which keeps the nesting under that of a header
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


@st.composite
def encoded(draw) -> Encoded:
    """One logical tensor of any parts and parameters."""
    names = st.sampled_from(["", "codes", "scales", "outlier_places"])
    parts = draw(st.dictionaries(names, tensors(), max_size=3))
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    plain = st.integers(0, 99) | st.booleans() | st.text(max_size=5)
    parameters = draw(st.dictionaries(st.text(max_size=8), plain, max_size=3))
    dtype = draw(st.sampled_from(FLOATS))
    return Encoded(draw(st.sampled_from(["hidden", "label"])), "int8", dtype, shape, parts, parameters)


TENSOR_NAMES = st.text(min_size=1, max_size=8).filter(lambda name: "#" not in name)
FRAMES = st.builds(
    Frame,
    kind=st.text(min_size=1, max_size=12),
    fields=st.dictionaries(st.text(max_size=6), JSON, max_size=3),
    tensors=st.dictionaries(TENSOR_NAMES, encoded(), max_size=3),
)


def _plain(tensor: torch.Tensor) -> Encoded:
    return Encoded("hidden", "raw", tensor.dtype, tuple(tensor.shape), {"": tensor})


@given(FRAMES)
def test_a_frame_survives_the_wire_bit_for_bit(frame):
    again = Frame.from_bytes(frame.to_bytes())
    assert (again.kind, again.fields, again.sender) == (frame.kind, frame.fields, frame.sender)
    assert again.stored.keys() == frame.stored.keys()
    for name, one in frame.tensors.items():
        assert again.tensors[name].entry == one.entry
    for name, tensor in frame.stored.items():
        found = again.stored[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert _bits(found) == _bits(tensor)  # bits, so that NaN equals itself and -0 is not 0


def test_views_of_one_tensor_travel_as_tensors_of_their_own():
    whole = torch.arange(12.0).reshape(4, 3)
    views = {"top": whole[:2], "bottom": whole[1:], "all": whole}
    again = Frame.from_bytes(Frame("K", {}, {name: _plain(view) for name, view in views.items()}).to_bytes())
    for name, view in views.items():
        assert torch.equal(again.stored[name], view)


@pytest.fixture(scope="module")
def frame() -> bytes:
    tensors = {"a": _plain(torch.ones(3, 2)), "b": _plain(torch.arange(4))}
    return Frame("Kind", {"step": 3}, tensors).to_bytes()


def test_every_truncation_and_every_extra_byte_is_refused(frame):
    for length in range(len(frame)):
        with pytest.raises(WireError):
            Frame.from_bytes(frame[:length])
    with pytest.raises(WireError, match="torn or padded"):
        Frame.from_bytes(frame + b"\0")


def test_every_flipped_bit_is_found(frame):
    for place in range(8 * len(frame)):
        damaged = bytearray(frame)
        damaged[place // 8] ^= 1 << place % 8
        with pytest.raises(WireError):
            Frame.from_bytes(bytes(damaged))


def test_a_damaged_payload_does_not_keep_its_tables_from_being_read(frame):
    announced = open_frame(frame[:-1] + bytes([frame[-1] ^ 1]))
    assert {name: entry.shape for name, entry in announced.entries.items()} == {"a": (3, 2), "b": (4,)}
    with pytest.raises(WireError, match="body's checksum is wrong"):
        announced.read()


@given(st.binary(max_size=200))
def test_any_bytes_at_all_are_refused(data):
    with pytest.raises(WireError):
        Frame.from_bytes(data)


@given(header=st.binary(max_size=60), body=st.binary(max_size=60))
def test_any_header_and_body_behind_a_good_prefix_are_refused(header, body):
    with pytest.raises(WireError):
        Frame.from_bytes(seal(header, body))


def _prefixed(*fields) -> bytes:
    lengths = SEALED.pack(*fields)
    return lengths + struct.pack("<II", zlib.crc32(b"{}", zlib.crc32(lengths)), zlib.crc32(b"{}"))


SPOILT = {
    "bad magic": ((b"PICK", VERSION, 0, 2, 2), "is the sender splitft"),
    "an older version": ((b"SPFT", 2, 0, 2, 2), r"version 2, this side .*version 3: update the other side"),
    "a newer version": ((b"SPFT", 4, 0, 2, 2), r"version 4, this side .*version 3: update this side"),
    "reserved bits": ((b"SPFT", VERSION, 7, 2, 2), "prefix is damaged"),
    "a body of 10 GB": ((b"SPFT", VERSION, 0, 2, 10 * 10**9), "declares 100000000"),
    "the largest body": ((b"SPFT", VERSION, 0, 2, 2**64 - 1), "torn or padded"),
    "a huge header": ((b"SPFT", VERSION, 0, MAX_HEADER_BYTES + 1, 2), "header of 1048577 bytes"),
}


@pytest.mark.parametrize(("prefix", "message"), SPOILT.values(), ids=SPOILT)
def test_a_prefix_that_promises_what_is_not_there_is_refused_without_allocating(prefix, message):
    tracemalloc.start()
    with pytest.raises(WireError, match=message):
        Frame.from_bytes(_prefixed(*prefix) + b"{}" + b"{}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_a_frame_over_the_limit_is_not_even_looked_at():
    with pytest.raises(WireError, match="over the limit of 100"):
        Frame.from_bytes(b"\0" * 101, limit=100)


def _header(**changes) -> bytes:
    facts = {"sender": "s", "kind": "K", "fields": {}, "tensors": {}}
    return json.dumps({k: v for k, v in {**facts, **changes}.items() if v is not None}).encode()


NO_TABLES = {
    "nothing": b"",
    "torn": b"{",
    "a list": b"[]",
    "a number": b"3",
    "a word": b'"x"',
    "not UTF-8": b"\xff\xfe",
    "no kind": _header(kind=None),
    "a kind of number": _header(kind=3),
    "a long kind": _header(kind="K" * 81),
    "fields of a list": _header(fields=[]),
    "tensors of a list": _header(tensors=[]),
    "a key more": _header(more=1),
    "a key twice": _header().replace(b"{", b'{"kind":"K",', 1),
    "deep": b"[" * 100_000,
    "deep in fields": _header(fields={"x": [[[[[[[[]]]]]]]]}),
    "a long number": b"1" * 10_000,
    "beyond 64 bits": _header(fields={"x": 2**63}),
    "beyond a double": _header().replace(b"{}", b'{"x":1e999}', 1),
    "not a number": _header(fields={"x": float("nan")}),
    "infinite": _header(fields={"x": float("-inf")}),
}


@pytest.mark.parametrize("header", NO_TABLES.values(), ids=NO_TABLES)
def test_a_header_that_leaves_room_is_refused(header):
    with pytest.raises(WireError, match="header"):
        Frame.from_bytes(seal(header, safetensors.save({})))


ENTRY = {"role": "hidden", "codec": "fp32", "dtype": "F32", "shape": [2]}
BAD_ENTRIES = {
    "no role": {k: v for k, v in ENTRY.items() if k != "role"},
    "a word more": {**ENTRY, "pickle": "x"},
    "a negative length": {**ENTRY, "shape": [-2]},
    "a huge length": {**ENTRY, "shape": [2**41]},
    "a length of true": {**ENTRY, "shape": [True]},
    "nine dimensions": {**ENTRY, "shape": [1] * 9},
    "an unknown type": {**ENTRY, "dtype": "F99"},
    "a type of list": {**ENTRY, "dtype": ["F32"]},
    "a long codec": {**ENTRY, "codec": "x" * 20},
    "parameters of a list": {**ENTRY, "parameters": [1]},
    "nine parameters": {**ENTRY, "parameters": {str(i): i for i in range(9)}},
    "a nested parameter": {**ENTRY, "parameters": {"x": [1]}},
    "a long parameter": {**ENTRY, "parameters": {"x": "y" * 41}},
}


@pytest.mark.parametrize("entry", BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_a_tensor_announced_with_more_or_less_than_it_has_is_refused(entry):
    with pytest.raises(WireError, match="'x'"):
        Frame.from_bytes(seal(_header(tensors={"x": entry}), safetensors.save({"x": torch.ones(2)})))


@pytest.mark.parametrize("name", ["", "#", "x#codes", "n" * 301])
def test_a_tensor_has_a_plain_name(name):
    with pytest.raises(WireError, match="not the name of a tensor"):
        Frame.from_bytes(seal(_header(tensors={name: ENTRY}), safetensors.save({"x": torch.ones(2)})))


def _with_table(table: object, data: bytes = b"") -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    tensors = {"x": ENTRY, "y": ENTRY}
    return seal(_header(tensors=tensors), struct.pack("<Q", len(text)) + text + data)


def _at(start: int, stop: int, **changes) -> dict:
    return {"dtype": "F32", "shape": [(stop - start) // 4], "data_offsets": [start, stop], **changes}


BAD_TABLES = {
    "a huge product": {"x": _at(0, 8, shape=[2**31, 2**31])},
    "10 GB": {"x": _at(0, 10**10)},
    "a negative length": {"x": _at(0, 8, shape=[-1])},
    "another length": {"x": _at(0, 8, shape=[3])},
    "backwards": {"x": _at(8, 0, shape=[2])},
    "an unknown type": {"x": _at(0, 8, dtype="F99")},
    "a type of four bits": {"x": _at(0, 8, dtype="F4", shape=[16])},
    "complex": {"x": _at(0, 8, dtype="C64", shape=[1])},
    "no list": {"x": _at(0, 8, shape="2")},
    "nothing of much": {"x": _at(0, 0, shape=[2**62, 0])},
    "an overlap": {"x": _at(0, 8), "y": _at(4, 8)},
    "the same place": {"x": _at(0, 8), "y": _at(0, 8)},
    "a gap": {"x": _at(0, 4), "y": _at(6, 8, shape=[1], dtype="F16")},
    "a gap before": {"x": _at(4, 8)},
    "bytes behind": {"x": _at(0, 4)},
    "a stranger": {"z": _at(0, 8)},
    "a part with a strange name": {"x#Codes!": _at(0, 8)},
    "a part without a name": {"x#": _at(0, 8)},
    "offsets of three": {"x": _at(0, 8, data_offsets=[0, 4, 8])},
    "offsets of floats": {"x": _at(0, 8, data_offsets=[0.0, 8.0])},
    "beyond 64 bits": {"x": _at(0, 8, data_offsets=[0, 2**64])},
    "metadata": {"__metadata__": {"a": "b"}, "x": _at(0, 8)},
    "eleven parts": {f"x#{letter}": _at(8 if letter > "a" else 0, 8) for letter in "abcdefghijk"},
    "a list": [],
    "no JSON": b"{x",
    "a name twice": b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
}


@pytest.mark.parametrize("table", BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_tensor_table_that_lies_is_refused_before_any_allocation(table):
    frame = _with_table(table, b"\0" * 8)
    tracemalloc.start()
    with pytest.raises(WireError):
        open_frame(frame)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("length", [9, 2**40, 2**64 - 1])
def test_a_table_longer_than_the_body_is_refused(length):
    with pytest.raises(WireError, match="declares"):
        Frame.from_bytes(seal(_header(), struct.pack("<Q", length) + b"{}"))


def test_a_header_too_long_to_be_read_is_not_sent():
    with pytest.raises(WireError, match="is over 1048576"):
        Frame("K", {"x": "y" * MAX_HEADER_BYTES}, {}).to_bytes()


def test_a_number_that_json_has_not_is_not_sent():
    with pytest.raises(WireError, match="JSON cannot express"):
        Frame("K", {"loss": float("nan")}, {}).to_bytes()
