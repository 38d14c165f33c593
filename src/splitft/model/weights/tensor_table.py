"""Find the bytes of each tensor in a file in safetensors format.

    8 bytes: length N of the header | N bytes: JSON {tensor: dtype, shape, [begin, end)} | data

Only the header is needed, from a file on disk or from a server. A header comes from whoever published the
model, so every number in it is checked. The format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitft.errors import ModelError

LENGTH_BYTES = 8
MOST_HEADER_BYTES = 100_000_000
"""The format's own limit."""
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64,
    "I64": 64, "U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits of a number of each type."""


@dataclass(frozen=True)
class TensorBytes:
    """Place of one tensor in a file."""

    dtype: str
    """Name of the type in the format, such as BF16."""
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    stop: int
    """Byte after the last."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stop - self.start

    def preamble(self) -> bytes:
        """Return what a digest covers besides the bytes, which may be other numbers in another type."""
        return f"{self.dtype} {list(self.shape)}\n".encode()


def header_bytes(first: bytes, source: str) -> int:
    """Return the length of a header from the first bytes of its file. Raises ModelError for a bad one."""
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if len(first) < LENGTH_BYTES or not 2 <= length <= MOST_HEADER_BYTES:
        raise ModelError(f"{source} is not a readable safetensors file: its header has {length} bytes")
    return length


def parse_header(header: bytes, file_bytes: int, source: str) -> dict[str, TensorBytes]:
    """Return the place of each tensor in a file of `file_bytes`. Raises ModelError for a bad header."""
    begin = LENGTH_BYTES + len(header)
    try:
        content = json.loads(header)
        return {
            name: _place(entry, begin, file_bytes)
            for name, entry in content.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{source} is not a readable safetensors file: {error}") from error


def table_of(path: Path) -> dict[str, TensorBytes]:
    """Return the place of each tensor in a file on disk. Raises ModelError if it cannot be read."""
    try:
        with path.open("rb") as file:
            length = header_bytes(file.read(LENGTH_BYTES), str(path))
            return parse_header(file.read(length), path.stat().st_size, str(path))
    except OSError as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from error


def _place(entry: Mapping[str, Any], begin: int, file_bytes: int) -> TensorBytes:
    shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(f"a tensor has shape {shape} at [{start}, {stop})")
    place = TensorBytes(entry["dtype"], shape, begin + start, begin + stop)
    if math.prod(shape) * BITS[place.dtype] != 8 * place.size or place.stop > file_bytes:
        raise ValueError(
            f"a tensor of shape {shape} is said to be at [{start}, {stop}) of {file_bytes} bytes"
        )
    return place
