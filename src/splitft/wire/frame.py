"""One message as bytes: a short fixed prefix, a JSON header, and named tensors in safetensors format.

    "SPFT" | version u16 | zero u16 | header length u32 | body length u64 | header | body

All numbers are little-endian. The header is a JSON object: the kind of message and its plain fields.
The body is a safetensors file, whose own header gives each tensor's type, shape and place and is checked
by its Rust parser. Nothing here is ever unpickled. What a message means is `protocol`'s business.

Covered: length against the limit before anything is parsed, magic and version, exact lengths, valid JSON,
valid safetensors. Not covered: whether this message was expected and its numbers are finite (see
`protocol`), and who sent it (the connection's business).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors

from splitft.errors import WireError

MAGIC = b"SPFT"
VERSION = 1
MAX_FRAME_BYTES = 2**30
"""Longest frame that is read, by default: 1 GiB."""
MAX_HEADER_BYTES = 2**20
"""Longest JSON header."""

_PREFIX = struct.Struct("<4sHHIQ")


@dataclass(frozen=True)
class Frame:
    """One message before it has a meaning."""

    kind: str
    """Name of the message."""
    fields: Mapping[str, Any]
    """Its plain fields, as JSON has them."""
    tensors: Mapping[str, torch.Tensor]
    """Its tensors, in the types of the wire."""

    def to_bytes(self) -> bytes:
        """The frame as it travels."""
        header = json.dumps({"kind": self.kind, "fields": dict(self.fields)}, separators=(",", ":")).encode()
        if len(header) > MAX_HEADER_BYTES:
            raise WireError(f"a {self.kind} header of {len(header)} bytes is over {MAX_HEADER_BYTES}")
        body = safetensors.save(_apart(self.tensors))
        prefix: bytes = _PREFIX.pack(MAGIC, VERSION, 0, len(header), len(body))
        return b"".join((prefix, header, body))

    @classmethod
    def from_bytes(cls, data: bytes, limit: int = MAX_FRAME_BYTES) -> Frame:
        """Parse a frame of at most `limit` bytes. Raises WireError that says what is wrong with it."""
        if len(data) > limit:
            raise WireError(f"a frame of {len(data)} bytes is over the limit of {limit}")
        header_bytes, body_bytes = _lengths(data)
        start = _PREFIX.size + header_bytes
        if len(data) != start + body_bytes:
            raise WireError(f"a frame of {len(data)} bytes declares {start + body_bytes}: torn or padded")
        kind, fields = _header(data[_PREFIX.size : start])
        try:
            tensors = safetensors.load(data[start:])
        except (SafetensorError, ValueError, KeyError) as error:
            raise WireError(f"{kind}: the body is not safetensors: {error}") from error
        return cls(kind, fields, tensors)


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


def _lengths(data: bytes) -> tuple[int, int]:
    """Header and body length from the prefix."""
    if len(data) < _PREFIX.size:
        raise WireError(f"{len(data)} bytes are too few for a frame, whose prefix alone is {_PREFIX.size}")
    magic, version, zero, header_bytes, body_bytes = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise WireError(f"a frame begins with {MAGIC!r}, this one with {magic!r}: not from splitft?")
    if version != VERSION:
        raise WireError(f"the frame has version {version}, this side reads {VERSION}: update the older side")
    if zero or header_bytes > MAX_HEADER_BYTES:
        raise WireError(f"the frame's prefix is damaged: reserved {zero}, header of {header_bytes} bytes")
    return header_bytes, body_bytes


def _header(text: bytes) -> tuple[str, dict[str, Any]]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the frame's header is not JSON: {error}") from error
    if not (
        isinstance(header, dict)
        and header.keys() == {"kind", "fields"}
        and isinstance(header["kind"], str)
        and isinstance(header["fields"], dict)
    ):
        raise WireError("the frame's header is not an object with a kind and fields")
    return header["kind"], header["fields"]
