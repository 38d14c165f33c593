"""A reader of frames that knows `docs/wire-format.md` alone: no torch, no safetensors, none of ours.

It decodes most codecs to plain lists of numbers; what the page leaves to tables of the code (rotations,
entropy codes) it is told, or leaves alone.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

Numbers = list[float]


def read_frame(data: bytes) -> tuple[dict[str, Any], dict[str, tuple[list[int], Numbers]]]:
    """The header, and the stored tensors by name: shape and numbers."""
    magic, version, zero, h, b, header_crc, body_crc = struct.unpack("<4sHHIQII", data[:28])
    header, body = data[28 : 28 + h], data[28 + h :]
    assert (magic, version, zero, len(body)) == (b"SPFT", 3, 0, b)
    assert (zlib.crc32(data[:20] + header), zlib.crc32(body)) == (header_crc, body_crc)
    (t,) = struct.unpack("<Q", body[:8])
    payload = body[8 + t :]
    stored = {}
    for name, facts in json.loads(body[8 : 8 + t]).items():
        start, stop = facts["data_offsets"]
        stored[name] = (facts["shape"], numbers(facts["dtype"], payload[start:stop]))
    return json.loads(header), stored


def numbers(dtype: str, data: bytes) -> Numbers:
    """What stored bytes are as numbers."""
    letters = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U8": "B"}
    if dtype == "BF16":
        return [struct.unpack("<f", b"\0\0" + data[i : i + 2])[0] for i in range(0, len(data), 2)]
    if dtype == "F8_E4M3":
        return [_e4m3(byte) for byte in data]
    size = struct.calcsize(letters[dtype])
    return list(struct.unpack(f"<{len(data) // size}{letters[dtype]}", data))


def _e4m3(byte: int) -> float:
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def sizes(shape: Sequence[int]) -> tuple[int, int]:
    """N and D."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def groups(width: int) -> tuple[int, int]:
    """G and g."""
    count = max(1, math.ceil(width / 64))
    return count, math.ceil(width / count)


def decode(
    entry: Mapping[str, Any],
    parts: Mapping[str, Numbers],
    rotation: Sequence[Sequence[float]] | None = None,
) -> Numbers:
    """The tensor of one entry, row by row."""
    N, D = sizes(entry["shape"])
    codec, parameters = entry["codec"], entry.get("parameters", {})
    if codec in ("fp64", "fp32", "bf16", "raw"):
        return parts[""]
    if codec == "fp8":
        return [code * parts["scales"][i // D] for i, code in enumerate(parts["codes"])]
    if codec == "int8":
        if entry["role"] == "adapter":
            N, D = 1, N * D
        G, g = groups(D)
        steps = [2.0 ** (parameters["top"] + (byte - 255) / 8) for byte in parts["scales"]]
        rest = [code * steps[i // D * G + i % D // g] for i, code in enumerate(parts["codes"])]
        return (
            rest if N == 1 else [number for n in range(N) for number in _whole(rest[n * D :][:D], n, parts)]
        )
    if codec == "topk":
        k, rows = len(parts["values"]) // N, [0.0] * (N * D)
        for i, (place, value) in enumerate(zip(parts["places"], parts["values"], strict=True)):
            rows[i // k * D + int(place)] = value
        return rows
    if codec in ("int4", "int2"):
        assert rotation is not None
        return _packed(N, D, 4 if codec == "int4" else 2, parts, parameters["top"], rotation)
    raise AssertionError(f"{codec} is left alone here")


def _packed(
    N: int, D: int, b: int, parts: Mapping[str, Numbers], top: int, rotation: Sequence[Sequence[float]]
) -> Numbers:
    G, g = groups(D)
    packed = [int(byte) for byte in parts["codes"]]
    codes = [byte >> b * place & 2**b - 1 for place in range(8 // b) for byte in packed][: N * G * g]
    steps = [2.0 ** (top + (byte - 255) / 8) for byte in parts["scales"]]
    out: Numbers = []
    for n in range(N):
        row = [
            (codes[(n * G + i // g) * g + i % g] - (2**b - 1) / 2) * steps[n * G + i // g] for i in range(D)
        ]
        turned = [sum(row[j] * rotation[i][j] for j in range(D)) for i in range(D)]
        out += _whole(turned, n, parts)
    return out


def _whole(row: Numbers, n: int, parts: Mapping[str, Numbers]) -> Numbers:
    """Row n with what was apart."""
    for place, channel in enumerate(parts["channels"]):
        row[int(channel)] = parts["apart"][n * len(parts["channels"]) + place]
    return [number + mean for number, mean in zip(row, parts["mean"], strict=True)]


def version(values: Sequence[float]) -> int:
    """Of a held tensor in F32."""
    return zlib.crc32(struct.pack(f"<{len(values)}f", *values))
