"""`docs/wire-format.md` is true: its dump, its tables, and what a reader of it makes of frames."""

from __future__ import annotations

import dataclasses
import re
import struct
import zlib
from pathlib import Path

import pytest
import torch

from protocol.plain_reader import decode, frequencies, principal, read_frame, version
from splitft.adapters import AdapterState, Factors
from splitft.codecs import CODECS
from splitft.codecs import encoded as parts
from splitft.codecs import entropy_coder as entropy
from splitft.codecs.rotation import rotated
from splitft.protocol import (
    MESSAGES,
    Activations,
    GlobalAdapters,
    HeadGradient,
    LastHidden,
    MessageSerializer,
)
from splitft.protocol import frame_header as header
from splitft.protocol.adapter_deltas import SAME
from splitft.protocol.codec_state import CodecState
from splitft.protocol.control import CONTROL_MESSAGES
from splitft.protocol.frame import MAX_FRAME_BYTES, MAX_HEADER_BYTES, PREFIX, SENDER, VERSION, Frame
from splitft.specs import WireSpec

PAGE = (Path(__file__).parents[2] / "docs/wire-format.md").read_text(encoding="utf-8")
UP = {
    "RoundReady", "Activations", "HeadGradient", "AdapterUpload", "Evaluation", "Hello", "Declined", "Next",
    "Alive", "LocalStep", "TryCodec", "CodecsChosen",
}  # fmt: skip
DUMPED = LastHidden(step=5, hidden=torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.25, -1.0, 8.0, -0.125]]))
TERMS = MessageSerializer(4, torch.float32, torch.float32, WireSpec())


def _between(mark: str) -> str:
    return re.search(f"<!-- {mark} -->(.*?)<!-- /{mark} -->", PAGE, re.DOTALL).group(1)


def _rows(mark: str) -> list[list[str]]:
    lines = [line for line in _between(mark).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def _dumped() -> bytes:
    return dataclasses.replace(TERMS.pack(DUMPED), sender="splitft 0.1.0").to_bytes()


def annotated(data: bytes) -> str:
    """A frame as the page prints it."""
    h = PREFIX.unpack_from(data)[3]
    t = int.from_bytes(data[28 + h : 36 + h], "little")
    payload = 36 + h + t
    notes = [
        (0, 4, '"SPFT"'), (4, 8, f"version {VERSION}, reserved"), (8, 12, f"header of {h} bytes"),
        (12, 20, f"body of {len(data) - 28 - h} bytes"), (20, 24, "CRC-32 of prefix and header"),
        (24, 28, "CRC-32 of the body"), (28, 28 + h, "header"), (28 + h, 36 + h, f"table of {t} bytes"),
        (36 + h, payload, "table, filled up with blanks"), (payload, len(data) - 8, "row 0: 1, -2, 0.5, 3"),
        (len(data) - 8, len(data), "row 1: 0.25, -1, 8, -0.125"),
    ]  # fmt: skip
    lines = []
    for start, stop, note in notes:
        for place in range(start, stop, 16):
            piece = data[place : min(place + 16, stop)]
            text = "".join(chr(c) if 32 <= c < 127 else "." for c in piece)
            said = note if place == start else ""
            lines.append(f"{place:04x}  {piece.hex(' '):<47}  {text:<16}  {said}".rstrip())
    return "\n".join(lines)


def test_the_dump_is_a_frame_that_the_code_writes_and_reads():
    data = b"".join(
        bytes.fromhex(line[6:53]) for line in _between("dump").splitlines() if re.match("[0-9a-f]{4}  ", line)
    )
    assert data == _dumped()
    assert f"```\n{annotated(data)}\n```" == _between("dump").strip()
    found = TERMS.from_bytes(data)
    assert (found.step, found.hidden.tolist()) == (DUMPED.step, DUMPED.hidden.tolist())
    facts, stored = read_frame(data)
    assert (facts["kind"], facts["fields"]) == ("LastHidden", {"step": 5})
    assert stored["hidden"] == ([2, 4], DUMPED.hidden.flatten().tolist())


@pytest.mark.parametrize(
    ("mark", "kinds"),
    [("messages", MESSAGES), ("control", {kind.frame_kind(): kind for kind in CONTROL_MESSAGES})],
)
def test_the_page_names_every_message_with_its_fields_and_roles(mark, kinds):
    table = {row[0]: row[1:] for row in _rows(mark)}
    assert table.keys() == kinds.keys()
    for name, kind in kinds.items():
        plain = [field for field in kind.model_fields if field not in kind.ROLES]
        tensors = [f"{field} ({role})" for field, role in kind.ROLES.items()]
        assert table[name] == ["client" if name in UP else "server", ", ".join(plain), ", ".join(tensors)]


def test_the_page_names_every_codec_and_no_other():
    assert [row[0] for row in _rows("codecs")] == [*CODECS, "raw", SAME]
    for name in CODECS:
        assert re.search(rf"^### .*\b{name}\b", PAGE, re.MULTILINE), name


def test_the_pages_limits_are_those_of_the_code():
    limits = [int(re.search(r"\d+", row[1]).group()) for row in _rows("limits")]
    assert limits == [
        MAX_FRAME_BYTES, MAX_HEADER_BYTES, header.MAX_DEPTH, header.MAX_TENSORS, parts.MAX_PARTS,
        parts.MAX_PARAMETERS, parts.MAX_DIMENSIONS, parts.MAX_LENGTH, parts.MAX_NAME,
    ]  # fmt: skip
    assert f"Version of this layout: **{VERSION}**" in PAGE
    for dtype in parts.DTYPES:
        assert f"`{dtype}`" in PAGE


WIDTH = 128
PLAIN = ("fp64", "fp32", "bf16", "fp8", "int8", "int4", "int2", "topk")
"""Codecs that need no memory and no tables beside a rotation."""


def _numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def _messages(name: str) -> list:
    sent = {"client": "a", "round": 1, "step": 2, "training": True, "lengths": (3, 2)}
    last = HeadGradient(client="a", round=1, step=2, loss=1.5, gradient=_numbers(3, WIDTH))
    return [Activations(**sent, labelled=((0, 2), (1, 2)), hidden=_numbers(5, WIDTH)), last]


@pytest.mark.parametrize("name", PLAIN)
def test_a_reader_that_knows_the_page_alone_finds_what_we_find(name):
    terms = MessageSerializer(WIDTH, torch.float64, torch.float64, WireSpec(hidden=name, gradient=name))
    for message in _messages(name):
        data = terms.to_bytes(message)
        facts, stored = read_frame(data)
        assert facts["kind"] == message.frame_kind()
        fields = type(message).model_fields
        left_out = {one for one in message.LEFT_OUT if getattr(message, one) == fields[one].default}
        assert facts["fields"].keys() == fields.keys() - message.ROLES.keys() - left_out
        for tensor, entry in facts["tensors"].items():
            own = {part.partition("#")[2]: values for part, (_, values) in stored.items()
                   if part.partition("#")[0] == tensor}  # fmt: skip
            turn = rotated(torch.eye(WIDTH)).tolist() if name in ("int4", "int2") else None
            found = torch.tensor(decode(entry, own, turn), dtype=torch.float64)
            wanted = getattr(terms.from_bytes(data), tensor)
            assert entry["shape"] == list(wanted.shape)
            torch.testing.assert_close(found, wanted.double().flatten(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 6])
def test_the_reader_follows_a_stream_along_principal_axes(bits):
    width, held = 64, {}
    terms = MessageSerializer(width, torch.float32, torch.float32, WireSpec(hidden=f"principal:bits={bits}"))
    ends, turn = (CodecState(), CodecState()), rotated(torch.eye(width)).tolist()
    stages = []
    for step in range(4):
        hidden = torch.randn(71, width, generator=torch.Generator().manual_seed(step)) * torch.logspace(
            0, -2, width
        )
        hidden[5] += 100
        data = terms.to_bytes(LastHidden(step=step, hidden=hidden), ends[0])
        wanted = terms.from_bytes(data, state=ends[1]).hidden
        facts, stored = read_frame(data)
        entry, own = (
            facts["tensors"]["hidden"],
            {name.partition("#")[2]: v for name, (_, v) in stored.items()},
        )
        stages.append(entry["parameters"]["stage"])
        if stages[-1] == 0:
            continue
        if stages[-1] == 1:
            held = own
        assert entry["parameters"]["lone"] >= 1
        found = torch.tensor(principal(entry, own, held, turn)).reshape(wanted.shape)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert {1, 2} <= set(stages)


def test_the_pages_frequencies_are_those_of_the_code():
    flat = [frequency for of_class in frequencies() for frequency in of_class]
    crc = zlib.crc32(struct.pack(f"<{len(flat)}I", *flat))
    assert crc == entropy.TABLES_CRC32
    assert f"have the CRC-32 `{crc:08x}`" in PAGE


def test_the_frame_of_a_message_is_what_the_page_calls_it():
    assert read_frame(Frame("K", {"x": 1}).to_bytes())[0] == {
        "sender": SENDER, "kind": "K", "fields": {"x": 1}, "tensors": {},
    }  # fmt: skip


def test_the_reader_follows_adapters_that_travel_as_changes():
    terms = MessageSerializer(WIDTH, torch.float32, torch.float32, WireSpec(adapter="int8"))
    ends, held = (CodecState(), CodecState()), {}
    first = {(0, "q"): Factors(_numbers(2, WIDTH), _numbers(WIDTH, 2))}
    second = {key: Factors(one.A * 1.01, one.B) for key, one in first.items()}
    for number, factors in enumerate((first, second)):
        message = GlobalAdapters(round=number, adapters=AdapterState(factors))
        data = terms.to_bytes(message, ends[0])
        wanted = terms.from_bytes(data, state=ends[1]).adapters.tensors()
        facts, stored = read_frame(data)
        for name, entry in facts["tensors"].items():
            key, about = name.removeprefix("adapters/"), entry.get("parameters", {})
            own = {part.partition("#")[2]: values for part, (_, values) in stored.items()
                   if part.partition("#")[0] == name}  # fmt: skip
            base = held.get(key, [0.0] * wanted[key].numel())
            assert ("base" in about) == (number == 1)
            if "base" in about:
                assert version(base) == about["version"]
            change = [0.0] * len(base) if entry["codec"] == SAME else decode(entry, own)
            held[key] = (torch.tensor(base) + torch.tensor(change)).tolist()
            torch.testing.assert_close(torch.tensor(held[key]), wanted[key].flatten(), rtol=1e-6, atol=1e-6)
            held[key] = wanted[key].flatten().tolist()
