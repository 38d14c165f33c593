"""One message as bytes: a fixed prefix, a JSON header, and named tensors in safetensors format.

    "SPFT" | version u16 | zero u16 | header length u32 | body length u64 | header crc u32 | body crc u32
    header | body

All numbers are little-endian. The header names the sender's version, the kind of message, its plain fields,
and for each tensor its role, codec, type and shape (`header`). The body is a safetensors file that holds the
parts that the codecs made of the tensors (`parts`). The first checksum covers the 20 bytes of the prefix
before it and the header, the second the body; both are CRC-32 as in zlib. Nothing here is ever unpickled.

    open_frame(bytes) -> UnreadFrame    prefix, header and table of tensors checked; the payload is untouched
    UnreadFrame.read() -> Frame         checksum of the body, then the tensors

Between the two stands `protocol`, which knows what was due. Not covered: who sent it (the connection's
business).
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

from splitft.codecs.encoded import Encoded, TensorEntry
from splitft.errors import WireError
from splitft.protocol.frame_header import announced, entries_of, placed, strict_json
from splitft.version import __version__

MAGIC = b"SPFT"
VERSION = 3
"""Of this layout. 1 had no checksums and did not say how a tensor was written."""
MAX_FRAME_BYTES = 2**30
"""Longest frame that is read, by default: 1 GiB."""
MAX_HEADER_BYTES = 2**20
"""Longest JSON header, and longest table of tensors in the body."""
SENDER = f"splitft {__version__}"

PREFIX = struct.Struct("<4sHHIQII")
SEALED = struct.Struct("<4sHHIQ")
"""What of the prefix the header's checksum covers."""
_TABLE = struct.Struct("<Q")


@dataclass(frozen=True)
class Frame:
    """One message before it has a meaning."""

    kind: str
    """Name of the message."""
    fields: Mapping[str, Any]
    """Its plain fields, as JSON has them."""
    tensors: Mapping[str, Encoded] = field(default_factory=dict)
    """Its tensors, as the codecs wrote them."""
    sender: str = SENDER
    """Program and version that made it."""

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        """The tensors in the body, by the names that they have there: `hidden`, or `hidden#codes`."""
        return {
            f"{name}#{part}" if part else name: tensor
            for name, encoded in self.tensors.items()
            for part, tensor in encoded.parts.items()
        }

    def to_bytes(self) -> bytes:
        """The frame as it travels."""
        entries = {name: encoded.entry for name, encoded in self.tensors.items()}
        facts = {
            "sender": self.sender,
            "kind": self.kind,
            "fields": dict(self.fields),
            "tensors": announced(entries),
        }
        try:
            header = json.dumps(facts, separators=(",", ":"), allow_nan=False).encode()
        except ValueError as error:
            raise WireError(f"a {self.kind} has a field that no header can carry: {error}") from error
        if len(header) > MAX_HEADER_BYTES:
            raise WireError(f"a {self.kind} header of {len(header)} bytes is over {MAX_HEADER_BYTES}")
        return seal(header, safetensors.save(_apart(self.stored)))

    @classmethod
    def from_bytes(cls, data: bytes, limit: int = MAX_FRAME_BYTES) -> Frame:
        """A frame of at most `limit` bytes, whatever its message means. Raises WireError."""
        return open_frame(data, limit).read()


@dataclass(frozen=True)
class UnreadFrame:
    """A frame whose tables are read and sound; its payload is as it came, nothing was allocated for it."""

    kind: str
    fields: Mapping[str, Any]
    sender: str
    entries: Mapping[str, TensorEntry]
    """Its tensors by name: role, codec, type, shape, and the parts that are stored."""
    data: bytes = field(repr=False)
    body_at: int
    body_crc: int

    def read(self) -> Frame:
        """The tensors too. Raises WireError if the payload was damaged on its way."""
        if zlib.crc32(memoryview(self.data)[self.body_at :]) != self.body_crc:
            raise WireError(f"{self.kind}: the body's checksum is wrong: the frame was damaged on its way")
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
    """Prefix, header and body as one frame."""
    lengths = SEALED.pack(MAGIC, VERSION, 0, len(header), len(body))
    checksums = (zlib.crc32(header, zlib.crc32(lengths)), zlib.crc32(body))
    return b"".join((lengths, struct.pack("<II", *checksums), header, body))


def open_frame(data: bytes, limit: int = MAX_FRAME_BYTES) -> UnreadFrame:
    """Check everything of a frame but its payload. Raises WireError that says what is wrong with it."""
    if len(data) > limit:
        raise WireError(f"a frame of {len(data)} bytes is over the limit of {limit}")
    header_bytes, body_bytes, header_crc, body_crc = _prefix(data)
    body_at = PREFIX.size + header_bytes
    if len(data) != body_at + body_bytes:
        raise WireError(f"a frame of {len(data)} bytes declares {body_at + body_bytes}: torn or padded")
    header = data[PREFIX.size : body_at]
    if zlib.crc32(header, zlib.crc32(data[: SEALED.size])) != header_crc:
        raise WireError("the header's checksum is wrong: the frame was damaged on its way")
    facts = strict_json(header, "the frame's header")
    if (
        facts.keys() != {"sender", "kind", "fields", "tensors"}
        or not isinstance(facts["sender"], str)
        or not isinstance(facts["kind"], str)
        or not isinstance(facts["fields"], dict)
        or max(len(facts["sender"]), len(facts["kind"])) > 80
    ):
        raise WireError("the frame's header is not a sender, a kind, fields and tensors")
    table, payload = _table(data, body_at)
    entries = placed(entries_of(facts["tensors"]), table, payload)
    return UnreadFrame(facts["kind"], facts["fields"], facts["sender"], entries, data, body_at, body_crc)


def _prefix(data: bytes) -> tuple[int, int, int, int]:
    """Lengths of header and body, and their checksums."""
    if len(data) < PREFIX.size:
        raise WireError(f"{len(data)} bytes are too few for a frame, whose prefix alone is {PREFIX.size}")
    magic, version, zero, header_bytes, body_bytes, header_crc, body_crc = PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise WireError(f"a frame begins with {MAGIC!r}, this one with {magic!r}: not from splitft?")
    if version != VERSION:
        raise WireError(
            f"the other side sends frames of version {version}, this side ({SENDER}) reads and writes "
            f"version {VERSION}: update {'the other' if version < VERSION else 'this'} side"
        )
    if zero or header_bytes > MAX_HEADER_BYTES:
        raise WireError(f"the frame's prefix is damaged: reserved {zero}, header of {header_bytes} bytes")
    return header_bytes, body_bytes, header_crc, body_crc


def _table(data: bytes, body_at: int) -> tuple[dict[str, Any], int]:
    """The body's own table of tensors, and the bytes of payload after it."""
    start = body_at + _TABLE.size
    if len(data) < start:
        raise WireError(f"a body of {len(data) - body_at} bytes is too short for a table of tensors")
    (length,) = _TABLE.unpack_from(data, body_at)
    if length > min(MAX_HEADER_BYTES, len(data) - start):
        raise WireError(f"the body's table of tensors declares {length} bytes, which are not there")
    return strict_json(data[start : start + length], "the table of tensors"), len(data) - start - length


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors, views of one another copied: safetensors refuses what shares memory."""
    apart: dict[str, torch.Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.contiguous()
        place = own.untyped_storage().data_ptr()
        apart[name] = own.clone() if place in taken else own
        taken.add(place)
    return apart
