"""Requests and replies between a server and its replicas, as bytes on a local pipe.

    length of header u64 | length of body u64 | header: JSON of kind and fields | body: safetensors

Both ends are this program, started by the same user, so there is no negotiation and no checksum; tensors keep
their types, to the last bit.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Any

import torch
from safetensors import torch as safetensors

_LENGTHS = struct.Struct("<QQ")


@dataclass(frozen=True)
class Packet:
    """One request or reply."""

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Plain values, as JSON has them."""
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def part(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors `name/...`, without the prefix."""
        prefix = f"{name}/"
        return {key[len(prefix) :]: one for key, one in self.tensors.items() if key.startswith(prefix)}


def under(name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors with `name/` before their names, as `Packet.part` takes them apart."""
    return {f"{name}/{key}": tensor for key, tensor in tensors.items()}


def write_packet(stream: IO[bytes], packet: Packet) -> None:
    """Write a packet. Raises OSError if nobody reads."""
    header = json.dumps({"kind": packet.kind, "fields": dict(packet.fields)}).encode()
    # clones, because tensors that share memory, such as rows of one tensor, cannot be saved
    body = safetensors.save({
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in packet.tensors.items()
    })  # fmt: skip
    stream.write(_LENGTHS.pack(len(header), len(body)))
    stream.write(header)
    stream.write(body)
    stream.flush()


def read_packet(stream: IO[bytes]) -> Packet:
    """Read the next packet. Raises EOFError if the other end has closed the pipe, or has died."""
    header_bytes, body_bytes = _LENGTHS.unpack(_exactly(stream, _LENGTHS.size))
    header = json.loads(_exactly(stream, header_bytes))
    return Packet(header["kind"], header["fields"], safetensors.load(_exactly(stream, body_bytes)))


def _exactly(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data
