"""One message as bytes: a fixed prefix, a JSON header, and named tensors in safetensors format.

    "SPFT" | version u16 | zero u16 | header length u32 | body length u64 | header crc u32 | body crc u32
    header | body

All numbers are little-endian. The header names the sender's version, the kind of message, its plain fields,
and for each tensor its role, codec, type and shape (`frame_header`). The body is a safetensors file of the
parts that codecs made of the tensors. The first checksum covers the 20 bytes of the prefix before it and the
header, the second the body; both are CRC-32 as in zlib. Nothing is ever unpickled.

    open_frame(bytes) -> UnreadFrame    checks prefix, header and table of tensors; does not touch the payload
    UnreadFrame.read() -> Frame         checks the checksum of the body, then reads the tensors

Between the two `serializer` checks the header against the terms of the run. The connection, not the frame,
authenticates the sender.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors

from splitft.codecs.encoded import Encoded
from splitft.errors import WireError
from splitft.foreign_text import printable
from splitft.protocol.frame_header import (
    FrameHeader,
    entries_as_json,
    parse_entries,
    parse_json,
    with_parts,
)
from splitft.version import __version__

MAGIC = b"SPFT"
VERSION = 3
"""Version of this layout; docs/wire-format.md lists the changes."""
MAX_FRAME_BYTES = 2**30
"""Longest frame that is read by default: 1 GiB."""
MAX_HEADER_BYTES = 2**20
"""Longest JSON header, and longest table of tensors in the body."""
SENDER = f"splitft {__version__}"

PREFIX = struct.Struct("<4sHHIQII")
SEALED = struct.Struct("<4sHHIQ")
"""Part of the prefix that the header's checksum covers."""
_TABLE = struct.Struct("<Q")


@dataclass(frozen=True)
class Frame:
    """A message with its tensors encoded."""

    kind: str
    """Name of the type of message."""
    fields: Mapping[str, Any]
    """Plain fields, as JSON has them."""
    tensors: Mapping[str, Encoded] = field(default_factory=dict)
    """Encoded tensors by name."""
    sender: str = SENDER
    """Program and version that made the frame."""

    @property
    def header(self) -> FrameHeader:
        """Everything but the payload."""
        entries = {name: encoded.entry for name, encoded in self.tensors.items()}
        return FrameHeader(self.kind, self.fields, self.sender, entries)

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        """Tensors of the body by their names there: `hidden`, or `hidden#codes`."""
        return {
            f"{name}#{part}" if part else name: tensor
            for name, encoded in self.tensors.items()
            for part, tensor in encoded.parts.items()
        }

    def to_bytes(self) -> bytes:
        """Return the frame as it travels. Raises WireError for a field or header that cannot be sent."""
        data = {
            "sender": self.sender,
            "kind": self.kind,
            "fields": dict(self.fields),
            "tensors": entries_as_json(self.header.entries),
        }
        try:
            header = json.dumps(data, separators=(",", ":"), allow_nan=False).encode()
        except ValueError as error:
            raise WireError(f"a {self.kind} has a field that JSON cannot express: {error}") from error
        if len(header) > MAX_HEADER_BYTES:
            raise WireError(f"a {self.kind} header of {len(header)} bytes is over {MAX_HEADER_BYTES}")
        return seal(header, safetensors.save(_unshared(self.stored)))

    @classmethod
    def from_bytes(cls, data: bytes, limit: int = MAX_FRAME_BYTES) -> Frame:
        """Read a frame of at most `limit` bytes without a check against the terms. Raises WireError."""
        return open_frame(data, limit).read()


@dataclass(frozen=True)
class UnreadFrame(FrameHeader):
    """A frame with a valid header and table of tensors, whose payload is not read yet."""

    data: bytes = field(repr=False)
    body_at: int
    body_crc: int

    def read(self) -> Frame:
        """Read the tensors. Raises WireError if the payload is damaged."""
        if zlib.crc32(memoryview(self.data)[self.body_at :]) != self.body_crc:
            raise WireError(f"{self.kind}: the body's checksum is wrong: the frame was damaged in transit")
        try:
            stored = safetensors.load(self.data[self.body_at :])
        except (SafetensorError, ValueError, KeyError) as error:
            raise WireError(f"{self.kind}: the body is not safetensors: {error}") from error
        tensors = {}
        for name, entry in self.entries.items():
            parts = {part: stored[f"{name}#{part}" if part else name] for part in entry.parts}
            tensors[name] = Encoded(
                entry.role, entry.codec, entry.dtype, entry.shape, parts, entry.parameters
            )
        return Frame(self.kind, self.fields, tensors, self.sender)


def seal(header: bytes, body: bytes) -> bytes:
    """Join header and body to a frame, with prefix and checksums."""
    lengths = SEALED.pack(MAGIC, VERSION, 0, len(header), len(body))
    checksums = (zlib.crc32(header, zlib.crc32(lengths)), zlib.crc32(body))
    return b"".join((lengths, struct.pack("<II", *checksums), header, body))


def open_frame(data: bytes, limit: int = MAX_FRAME_BYTES) -> UnreadFrame:
    """Check everything of a frame but its payload. Raises WireError for the first fault."""
    if len(data) > limit:
        raise WireError(f"a frame of {len(data)} bytes is over the limit of {limit}")
    header_bytes, body_bytes, header_crc, body_crc = _prefix(data)
    body_at = PREFIX.size + header_bytes
    if len(data) != body_at + body_bytes:
        raise WireError(f"a frame of {len(data)} bytes declares {body_at + body_bytes}: torn or padded")
    text = data[PREFIX.size : body_at]
    if zlib.crc32(text, zlib.crc32(data[: SEALED.size])) != header_crc:
        raise WireError("the header's checksum is wrong: the frame was damaged in transit")
    header = parse_json(text, "the frame's header")
    if (
        header.keys() != {"sender", "kind", "fields", "tensors"}
        or not isinstance(header["sender"], str)
        or not isinstance(header["kind"], str)
        or not isinstance(header["fields"], dict)
        or max(len(header["sender"]), len(header["kind"])) > 80
    ):
        raise WireError("the frame's header does not consist of sender, kind, fields and tensors")
    table, payload = _table(data, body_at)
    entries = with_parts(parse_entries(header["tensors"]), table, payload)
    sender = printable(header["sender"])
    return UnreadFrame(header["kind"], header["fields"], sender, entries, data, body_at, body_crc)


def _prefix(data: bytes) -> tuple[int, int, int, int]:
    """Return the lengths of header and body, and their checksums. Raises WireError."""
    if len(data) < PREFIX.size:
        raise WireError(f"{len(data)} bytes are too few for a frame, whose prefix has {PREFIX.size}")
    magic, version, zero, header_bytes, body_bytes, header_crc, body_crc = PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise WireError(f"a frame begins with {MAGIC!r}, this one with {magic!r}: is the sender splitft?")
    if version != VERSION:
        raise WireError(
            f"the other side sends frames of version {version}, this side ({SENDER}) reads and writes "
            f"version {VERSION}: update {'the other' if version < VERSION else 'this'} side"
        )
    if zero or header_bytes > MAX_HEADER_BYTES:
        raise WireError(f"the frame's prefix is damaged: reserved {zero}, header of {header_bytes} bytes")
    return header_bytes, body_bytes, header_crc, body_crc


def _table(data: bytes, body_at: int) -> tuple[dict[str, Any], int]:
    """Return the table of tensors and the bytes of payload after it. Raises WireError."""
    start = body_at + _TABLE.size
    if len(data) < start:
        raise WireError(f"a body of {len(data) - body_at} bytes is too short for a table of tensors")
    (length,) = _TABLE.unpack_from(data, body_at)
    if length > min(MAX_HEADER_BYTES, len(data) - start):
        raise WireError(f"the body's table of tensors declares {length} bytes, more than the body has")
    return parse_json(data[start : start + length], "the table of tensors"), len(data) - start - length


def _unshared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return contiguous tensors that share no memory, as safetensors requires."""
    unshared: dict[str, torch.Tensor] = {}
    used: set[int] = set()
    for name, tensor in tensors.items():
        contiguous = tensor.contiguous()
        address = contiguous.untyped_storage().data_ptr()
        unshared[name] = contiguous.clone() if address in used else contiguous
        used.add(address)
    return unshared
