"""A reader of frames that knows `docs/wire-format.md` alone: no torch, no safetensors, none of ours.

It decodes most codecs to plain lists of numbers; what the page leaves to tables of the code (rotations) it is
told.
"""

from __future__ import annotations

import itertools
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


CLASSES, LARGEST = 48, 127


def frequencies() -> list[list[int]]:
    """Of principal's entropy code, class by class."""
    classes = []
    for c in range(CLASSES):
        s = 2.0 ** ((c - 16) / 4)
        below = [(_normal(z - 0.5, s) + _laplace(z - 0.5, s)) / 2 for z in range(-LARGEST, LARGEST + 2)]
        p = [more - less for less, more in itertools.pairwise(below)]
        f = [1 + math.floor((2**15 - len(p)) * one / sum(p)) for one in p]
        f[LARGEST] += 2**15 - sum(f)
        classes.append(f)
    return classes


def uniform(bits: int) -> list[int]:
    """Frequencies of a symbol of so many bits."""
    return [0] * LARGEST + [2 ** (15 - bits)] * 2**bits + [0] * (LARGEST + 1 - 2**bits)


def _normal(x: float, s: float) -> float:
    return 0.5 * math.erfc(-x / s / math.sqrt(2))


def _laplace(x: float, s: float) -> float:
    b = s / math.sqrt(2)
    return 0.5 * math.exp(x / b) if x < 0 else 1 - 0.5 * math.exp(-x / b)


def entropy_decoded(data: bytes, classes: Sequence[int], N: int) -> list[list[int]]:
    """The whole numbers (N, A) of axes with these classes."""
    h, table = -(-N // 2), frequencies() + [uniform(bits) for bits in range(8)]
    states = list(struct.unpack(f"<{h}I", data[: 4 * h]))
    words = iter(struct.unpack(f"<{(len(data) - 4 * h) // 2}H", data[4 * h :]))
    lines = []
    for c in [*classes, *classes]:
        line = []
        for lane in range(h):
            slot, z, b = states[lane] % 2**15, 0, 0
            while b + table[c][z] <= slot:
                b, z = b + table[c][z], z + 1
            states[lane] = table[c][z] * (states[lane] // 2**15) + slot - b
            line.append(z - LARGEST)
        for lane in range(h):
            if states[lane] < 2**16:
                states[lane] = 2**16 * states[lane] + next(words)
        lines.append(line)
    assert states == [2**16] * h
    assert next(words, None) is None
    A = len(classes)
    return [[lines[n // h * A + a][n % h] for a in range(A)] for n in range(N)]


def principal(
    entry: Mapping[str, Any],
    parts: Mapping[str, Numbers],
    axes: Mapping[str, Numbers],
    rotation: Sequence[Sequence[float]],
) -> Numbers:
    """A message of stage 1 or 2 with the axes that are kept for its stream."""
    N, D = sizes(entry["shape"])
    about, basis, facts = entry["parameters"], axes["basis"], axes["facts"]
    columns, mean, spread = facts[:D], facts[D : 2 * D], facts[2 * D :]
    coded = [d for d in range(D) if spread[d] >= 0.1 * about["step"]]
    low = [min(max(math.ceil(math.log2(spread[d] / about["step"] / 16)), 0), 7) for d in coded]
    wide = zip(coded, low, strict=True)
    classes = [round(4 * math.log2(spread[d] / about["step"] / 2**b)) + 16 for d, b in wide]
    classes = [min(max(c, 0), CLASSES - 1) for c in classes] + [CLASSES + b for b in low if b]
    lines = entropy_decoded(bytes(int(byte) for byte in parts["codes"]), classes, N)
    codes = []
    for line in lines:
        bits = iter(line[len(coded) :])
        codes.append([z * 2**b + (next(bits) if b else 0) for z, b in zip(line, low, strict=False)])
    rows: list[Numbers] = []
    for n in range(N):
        scale = 2.0 ** (about["top"] + (parts["scales"][n] - 255) / 8)
        y = {d: z * about["step"] * columns[d] for d, z in zip(coded, codes[n], strict=True)}
        rows.append([scale * (mean[i] + sum(basis[i * D + d] * y[d] for d in coded)) for i in range(D)])
    if about["lone"]:
        lone = {name.removeprefix("lone_"): values for name, values in parts.items() if "lone_" in name}
        apart = _packed(about["lone"], D, 4, lone, about["lone_top"], rotation)
        for i, place in enumerate(parts["places"]):
            rows[int(place)] = apart[i * D :][:D]
    return [number for row in rows for number in row]


def version(values: Sequence[float]) -> int:
    """Of a held tensor in F32."""
    return zlib.crc32(struct.pack(f"<{len(values)}f", *values))
