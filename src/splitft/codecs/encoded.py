"""One tensor on the wire: what a codec stores for it, and what a receiver may hold the sender to.

    tensor --codec--> Encoded(parts: codes, scales, ...; parameters) --frame--> Encoded --codec--> tensor
                      Entry(role, codec, logical shape and type; Part of each stored tensor) goes ahead

An `TensorEntry` is known before any payload is read: from it and from what was agreed, a codec says in its
`layout` which parts there must be, of which type and how large, and a frame that promises anything else is
refused there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from splitft.errors import WireError

Parameter = int | float | str | bool
"""What a codec may note beside its parts."""

DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""Types that may be stored, by their names in safetensors."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""The same, the other way round."""

MAX_DIMENSIONS = 8
MAX_LENGTH = 2**40
"""Longest dimension of a tensor."""
MAX_PARTS = 10
"""Stored tensors of one logical tensor, at most."""
MAX_PARAMETERS = 8
MAX_NAME = 300
"""Letters in the name of a tensor, at most."""
PART_NAME = re.compile(r"[a-z_]{0,16}", re.ASCII)
"""Empty for the only part; otherwise `codes`, `scales` and the like."""


@dataclass(frozen=True)
class StoredPart:
    """One stored tensor: as announced, or as it must be."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    at_most: bool = False
    """In a layout: the first dimension may be anything up to this (compressed bytes, chosen positions)."""

    @property
    def nbytes(self) -> int:
        """Size of the payload."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size

    def admits(self, other: StoredPart) -> bool:
        """Whether what was announced is what must be."""
        if self.dtype != other.dtype or len(self.shape) != len(other.shape):
            return False
        if self.at_most and self.shape:
            return other.shape[0] <= self.shape[0] and other.shape[1:] == self.shape[1:]
        return other.shape == self.shape

    def __str__(self) -> str:
        most = "at most " if self.at_most else ""
        return f"{NAMES.get(self.dtype, self.dtype)} {most}{list(self.shape)}"


@dataclass(frozen=True)
class TensorEntry:
    """One logical tensor as its frame announces it; no payload yet."""

    role: str
    """What it is: hidden, gradient, adapter or label."""
    codec: str
    """Name of the codec that wrote it."""
    dtype: torch.dtype
    """Type that the sender computes in."""
    shape: tuple[int, ...]
    """Its own shape, whatever its parts are."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    """What the codec noted."""
    parts: Mapping[str, StoredPart] = field(default_factory=dict)
    """Stored tensors by name."""

    def check(self, name: str, layout: Mapping[str, StoredPart]) -> None:
        """Raise WireError unless the parts announced are those of the layout."""
        if self.parts.keys() != layout.keys():
            due, found = (", ".join(map(repr, sorted(keys))) for keys in (layout, self.parts))
            raise WireError(f"{name!r} in codec {self.codec} has the parts {found}; due were {due}")
        for part, due_part in layout.items():
            if not due_part.admits(self.parts[part]):
                called = f"{name}#{part}" if part else name
                raise WireError(f"{called!r} comes as {self.parts[part]}; {self.codec} has {due_part} here")


@dataclass(frozen=True)
class Encoded:
    """One logical tensor with its payload."""

    role: str
    codec: str
    dtype: torch.dtype
    """Type that the sender computes in."""
    shape: tuple[int, ...]
    parts: Mapping[str, torch.Tensor]
    """Stored tensors by name; the empty name for the only one."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of its payload."""
        return sum(part.numel() * part.dtype.itemsize for part in self.parts.values())

    @property
    def entry(self) -> TensorEntry:
        """What a frame announces of it."""
        parts = {name: StoredPart(part.dtype, tuple(part.shape)) for name, part in self.parts.items()}
        return TensorEntry(self.role, self.codec, self.dtype, self.shape, self.parameters, parts)
