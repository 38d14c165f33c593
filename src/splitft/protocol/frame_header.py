"""The two tables of a frame, read from bytes with strict bounds: its JSON header and its tensor table.

    header   {"sender": "splitft 0.1.0", "kind": "Activations", "fields": {...},
              "tensors": {"hidden": {"role": "hidden", "codec": "bf16", "dtype": "F32", "shape": [5, 4]}}}
    table    {"hidden": {"dtype": "BF16", "shape": [5, 4], "data_offsets": [0, 40]}}        of safetensors

Both are JSON, and JSON leaves room: keys that come twice, numbers without end, NaN, nesting. None of that is
let in. The tensors of the table must lie one after the other from the first byte of the payload to the last,
each as long as its shape and type say, so none overlaps another, and nothing hides between them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

from splitft.codecs.encoded import (
    DTYPES,
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
"""Logical tensors in a frame, at most."""

_BRACKET = re.compile(r"[\[\]{}]")
_ENTRY = {"role", "codec", "dtype", "shape"}


def strict_json(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object without doubtful parts. Raises WireError that says what is wrong with it."""
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
        raise WireError(f"{what} is not JSON as it may be here: {error}") from error
    if not isinstance(value, dict):
        raise WireError(f"{what} is not an object")
    return value


def entries_of(tensors: object) -> dict[str, TensorEntry]:
    """The logical tensors that a header announces, their parts still unknown."""
    if not isinstance(tensors, dict) or len(tensors) > MAX_TENSORS:
        raise WireError(f"the frame's header has no object of at most {MAX_TENSORS} tensors")
    entries = {}
    for name, facts in tensors.items():
        if not name or len(name) > MAX_NAME or "#" in name:
            raise WireError(f"{name[:40]!r} is not the name of a tensor")
        if not isinstance(facts, dict) or facts.keys() - {"parameters"} != _ENTRY:
            raise WireError(f"tensor {name!r} is not announced by {', '.join(sorted(_ENTRY))}")
        role, codec = facts["role"], facts["codec"]
        if not (isinstance(role, str) and isinstance(codec, str) and len(role) < 20 and len(codec) < 20):
            raise WireError(f"tensor {name!r} has a role or a codec that is no short name")
        dtype = _dtype(name, facts["dtype"])
        entries[name] = TensorEntry(
            role, codec, dtype, _shape(name, facts["shape"]), _parameters(name, facts)
        )
    return entries


def placed(
    entries: Mapping[str, TensorEntry], table: Mapping[str, Any], payload: int
) -> dict[str, TensorEntry]:
    """The same entries with the parts that the tensor table has for them, which fill the payload exactly."""
    parts: dict[str, dict[str, StoredPart]] = {name: {} for name in entries}
    places: list[tuple[int, int]] = []
    for stored, facts in table.items():
        name, mark, part = stored.partition("#")
        if name not in parts or bool(mark) != bool(part) or not PART_NAME.fullmatch(part):
            raise WireError(f"{stored[:60]!r} is stored, but the header announces no such tensor")
        if not isinstance(facts, dict) or facts.keys() != {"dtype", "shape", "data_offsets"}:
            raise WireError(f"{stored!r} is not stored by dtype, shape and data_offsets")
        one = StoredPart(_dtype(stored, facts["dtype"]), _shape(stored, facts["shape"]))
        places.append(_place(stored, facts["data_offsets"], one.nbytes))
        parts[name][part] = one
        if len(parts[name]) > MAX_PARTS:
            raise WireError(f"tensor {name!r} is stored in more than {MAX_PARTS} parts")
    end = 0
    for start, stop in sorted(places):
        if start != end:
            raise WireError(f"the stored tensors overlap or leave a gap at byte {min(start, end)}")
        end = stop
    if end != payload:
        raise WireError(f"the stored tensors fill {end} bytes of a payload of {payload}")
    return {name: replace(entry, parts=parts[name]) for name, entry in entries.items()}


def announced(entries: Mapping[str, TensorEntry]) -> dict[str, Any]:
    """Entries as the header has them."""
    table: dict[str, Any] = {}
    for name, entry in entries.items():
        facts = {
            "role": entry.role,
            "codec": entry.codec,
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
        }
        table[name] = {**facts, "parameters": dict(entry.parameters)} if entry.parameters else facts
    return table


def _too_deep(text: str) -> bool:
    """Whether a JSON text nests deeper than it may, strings left out; in linear time, no recursion."""
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
        raise ValueError("a key comes twice in one object")
    return known


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= (value := int(text)) < 2**63:
        raise ValueError(f"a whole number of {len(text)} letters is beyond 64 bits")
    return value


def _real(text: str) -> float:
    if len(text) > 40 or not math.isfinite(value := float(text)):
        raise ValueError("a number is beyond 64 bits")
    return value


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _dtype(name: str, value: object) -> Any:
    if not isinstance(value, str) or value not in DTYPES:
        raise WireError(f"{name!r} has the type {str(value)[:20]!r}; known are {', '.join(DTYPES)}")
    return DTYPES[value]


def _shape(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS:
        raise WireError(f"{name!r} has no shape of at most {MAX_DIMENSIONS} dimensions")
    if not all(type(length) is int and 0 <= length <= MAX_LENGTH for length in value):
        raise WireError(f"{name!r} has a shape whose lengths are not from 0 to {MAX_LENGTH}")
    return tuple(value)


def _parameters(name: str, facts: Mapping[str, Any]) -> Mapping[str, Any]:
    value = facts.get("parameters", {})
    if not isinstance(value, dict) or len(value) > MAX_PARAMETERS:
        raise WireError(f"tensor {name!r} has no object of at most {MAX_PARAMETERS} parameters")
    for key, one in value.items():
        if (
            not isinstance(one, int | float | str)
            or len(key) > 20
            or (isinstance(one, str) and len(one) > 40)
        ):
            raise WireError(f"tensor {name!r} has a parameter {key[:20]!r} that is no plain short value")
    return value


def _place(name: str, value: object, nbytes: int) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(type(place) is int for place in value):
        raise WireError(f"{name!r} has no two data_offsets")
    start, stop = value
    if start < 0 or stop - start != nbytes:
        raise WireError(f"{name!r} lies in [{start}, {stop}), but its shape and type take {nbytes} bytes")
    return start, stop
