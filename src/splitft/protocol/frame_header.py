"""The header of a frame and its table of tensors, parsed from bytes with strict limits.

    header   {"sender": "splitft 0.1.0", "kind": "Activations", "fields": {...},
              "tensors": {"hidden": {"role": "hidden", "codec": "bf16", "dtype": "F32", "shape": [5, 4]}}}
    table    {"hidden": {"dtype": "BF16", "shape": [5, 4], "data_offsets": [0, 40]}}        of safetensors

Both are JSON without repeated keys, unlimited numbers, NaN or deep nesting. The tensors of the table must
follow one another from the first byte of the payload to the last, each as long as its shape and type say, so
that none overlaps another and nothing is hidden between them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from splitft.codecs.encoded import (
    DTYPES,
    MAX_CODEC_NAME,
    MAX_DIMENSIONS,
    MAX_LENGTH,
    MAX_NAME,
    MAX_PARAMETERS,
    MAX_PARTS,
    NAMES,
    PART_NAME,
    StoredPart,
    TensorEntry,
)
from splitft.errors import WireError

MAX_DEPTH = 8
"""Deepest nesting of the header."""
MAX_TENSORS = 2**14
"""Most logical tensors in a frame."""

_BRACKET = re.compile(r"[\[\]{}]")
_ENTRY = {"role", "codec", "dtype", "shape"}


@dataclass(frozen=True)
class FrameHeader:
    """Everything about a frame but its payload."""

    kind: str
    """Name of the type of message."""
    fields: Mapping[str, Any]
    """Plain fields, as JSON has them."""
    sender: str
    """Program and version that made the frame."""
    entries: Mapping[str, TensorEntry]
    """Tensors by name: role, codec, type, shape, and the parts that are stored."""

    @property
    def payload_bytes(self) -> dict[str, int]:
        """Size of the payload of each tensor, in bytes."""
        return {
            name: sum(part.nbytes for part in entry.parts.values()) for name, entry in self.entries.items()
        }


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object strictly. Raises WireError, which calls the text `what`."""
    try:
        decoded = text.decode("utf-8")
        if _too_deep(decoded):
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        value = json.loads(
            decoded,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_real,
            parse_constant=_constant,
        )
    except (ValueError, RecursionError) as error:
        raise WireError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise WireError(f"{what} is not an object")
    return value


def parse_entries(tensors: object) -> dict[str, TensorEntry]:
    """Parse the logical tensors of a header; their parts are not known yet. Raises WireError."""
    if not isinstance(tensors, dict) or len(tensors) > MAX_TENSORS:
        raise WireError(f"the frame's header lacks an object of at most {MAX_TENSORS} tensors")
    entries = {}
    for name, data in tensors.items():
        if not name or len(name) > MAX_NAME or "#" in name:
            raise WireError(f"{name[:40]!r} is not the name of a tensor")
        if not isinstance(data, dict) or data.keys() - {"parameters"} != _ENTRY:
            raise WireError(f"tensor {name!r} is not announced by {', '.join(sorted(_ENTRY))}")
        role, codec = data["role"], data["codec"]
        if not (
            isinstance(role, str) and isinstance(codec, str) and max(len(role), len(codec)) <= MAX_CODEC_NAME
        ):
            raise WireError(f"tensor {name!r} has a role or a codec that is not a short name")
        dtype = _dtype(name, data["dtype"])
        entries[name] = TensorEntry(role, codec, dtype, _shape(name, data["shape"]), _parameters(name, data))
    return entries


def with_parts(
    entries: Mapping[str, TensorEntry], table: Mapping[str, Any], payload: int
) -> dict[str, TensorEntry]:
    """Add the parts in the table of tensors. Raises WireError unless they fill the payload exactly."""
    parts: dict[str, dict[str, StoredPart]] = {name: {} for name in entries}
    offsets: list[tuple[int, int]] = []
    for stored, data in table.items():
        name, mark, part = stored.partition("#")
        if name not in parts or bool(mark) != bool(part) or not PART_NAME.fullmatch(part):
            raise WireError(f"{stored[:60]!r} is stored, but the header announces no such tensor")
        if not isinstance(data, dict) or data.keys() != {"dtype", "shape", "data_offsets"}:
            raise WireError(f"{stored!r} is not stored by dtype, shape and data_offsets")
        one = StoredPart(_dtype(stored, data["dtype"]), _shape(stored, data["shape"]))
        offsets.append(_offsets(stored, data["data_offsets"], one.nbytes))
        parts[name][part] = one
        if len(parts[name]) > MAX_PARTS:
            raise WireError(f"tensor {name!r} is stored in more than {MAX_PARTS} parts")
    end = 0
    for start, stop in sorted(offsets):
        if start != end:
            raise WireError(f"the stored tensors overlap or leave a gap at byte {min(start, end)}")
        end = stop
    if end != payload:
        raise WireError(f"the stored tensors fill {end} bytes of a payload of {payload}")
    return {name: replace(entry, parts=parts[name]) for name, entry in entries.items()}


def entries_as_json(entries: Mapping[str, TensorEntry]) -> dict[str, Any]:
    """Invert `parse_entries`."""
    table: dict[str, Any] = {}
    for name, entry in entries.items():
        data = {
            "role": entry.role,
            "codec": entry.codec,
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
        }
        table[name] = {**data, "parameters": dict(entry.parameters)} if entry.parameters else data
    return table


def _too_deep(text: str) -> bool:
    """Return whether a JSON text is nested too deeply, in linear time and without recursion."""
    outside = "".join(text.replace("\\\\", "").replace('\\"', "").split('"')[::2])
    depth = 0
    for bracket in _BRACKET.finditer(outside):
        depth += 1 if bracket.group() in "[{" else -1
        if depth > MAX_DEPTH:
            return True
    return False


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    known = dict(pairs)
    if len(known) < len(pairs):
        raise ValueError("a key is repeated in an object")
    return known


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= (value := int(text)) < 2**63:
        raise ValueError(f"an integer of {len(text)} digits exceeds 64 bits")
    return value


def _real(text: str) -> float:
    if len(text) > 40 or not math.isfinite(value := float(text)):
        raise ValueError("a number exceeds 64 bits")
    return value


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number in JSON")


def _dtype(name: str, value: object) -> Any:
    if not isinstance(value, str) or value not in DTYPES:
        raise WireError(f"{name!r} has the type {str(value)[:20]!r}; known are {', '.join(DTYPES)}")
    return DTYPES[value]


def _shape(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        raise WireError(f"{name!r} lacks a shape of at most {MAX_DIMENSIONS} dimensions")
    if not all(type(length) is int and 0 <= length <= MAX_LENGTH for length in value):
        raise WireError(f"{name!r} has a shape with a length outside 0 to {MAX_LENGTH}")
    return tuple(value)


def _parameters(name: str, data: Mapping[str, Any]) -> Mapping[str, Any]:
    value = data.get("parameters", {})
    if not isinstance(value, dict) or len(value) > MAX_PARAMETERS:
        raise WireError(f"tensor {name!r} lacks an object of at most {MAX_PARAMETERS} parameters")
    for key, one in value.items():
        if (
            not isinstance(one, int | float | str)
            or len(key) > 20
            or (isinstance(one, str) and len(one) > 40)
        ):
            raise WireError(f"tensor {name!r} has a parameter {key[:20]!r} that is not a short plain value")
    return value


def _offsets(name: str, value: object, nbytes: int) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(type(one) is int for one in value):
        raise WireError(f"{name!r} lacks two data_offsets")
    start, stop = value
    if start < 0 or stop - start != nbytes:
        raise WireError(f"{name!r} lies in [{start}, {stop}), but its shape and type take {nbytes} bytes")
    return start, stop
