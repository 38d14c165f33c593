"""Keep single tensors of a large file in a folder, each in a safetensors file of its own.

    FOLDER/model-layers-0-mlp-up-proj-weight~1f0c9a2744.part  --finish-->  ....safetensors

A tensor that is underway has a `.part`, which the next attempt continues, in this process or another. The
header of a finished one has the SHA-256 of what arrived, so that what a disk loses later is found.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from splitft.errors import ModelError
from splitft.model.weights.digests import CHUNK_BYTES, tensor_digests
from splitft.model.weights.tensor_table import LENGTH_BYTES, TensorBytes
from splitft.names import file_safe

TENSOR, DIGEST = "tensor", "sha256"
BLANK = "0" * 64
"""Place of the digest until the tensor is complete."""


class TensorFolder:
    """The tensors of one file that are on this machine."""

    def __init__(self, folder: Path, table: Mapping[str, TensorBytes]) -> None:
        self.folder, self.table = folder, table
        self._names = file_safe(table)

    def path(self, key: str) -> Path:
        """Return the file of a tensor."""
        return self.folder / f"{self._names[key]}.safetensors"

    def holds(self, key: str) -> bool:
        """Return whether a tensor is complete."""
        return self.path(key).is_file()

    def has_begun(self, key: str) -> bool:
        """Return whether a part of a tensor has arrived."""
        return _part(self.path(key)).is_file()

    def load(self, key: str) -> torch.Tensor:
        """Return a tensor, in memory that is mapped from its file."""
        try:
            with safe_open(self.path(key), framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(TENSOR)
        except (SafetensorError, OSError) as error:  # a type that this version of torch lacks
            raise ModelError(f"tensor {key} of the model cannot be read: {error}") from error
        return tensor

    def digest(self, key: str) -> str | None:
        """Return the SHA-256 of a tensor; None, and without its file, if it is not what had arrived.

        A file is hashed once and again whenever somebody touched it.
        """
        path = self.path(key)
        try:
            with safe_open(path, framework="pt") as file:
                arrived = file.metadata()[DIGEST]
            if tensor_digests(path, [TENSOR])[TENSOR] == arrived:
                return str(arrived)
        except (SafetensorError, OSError, KeyError, TypeError, ModelError):
            pass
        path.unlink(missing_ok=True)
        return None

    @contextlib.contextmanager
    def draft(self, key: str, resume: bool) -> Iterator[Draft]:
        """Open a tensor that is underway, with the bytes that arrived before if they are to be used."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = Draft(self.path(key), self.table[key], resume)
        try:
            yield draft
        finally:
            draft.close()


class Draft:
    """A tensor of which a part has arrived."""

    def __init__(self, path: Path, place: TensorBytes, resume: bool) -> None:
        self._path, self._part = path, _part(path)
        self._size, self._header, self.have = place.size, _header(place), 0
        self._digest = hashlib.sha256(place.preamble())
        self._file = open(self._part, "r+b" if self._part.exists() else "w+b")  # noqa: SIM115
        if not (resume and self._resume()):
            self._file.seek(0)
            self._file.truncate()
            self._file.write(self._header)

    @property
    def missing(self) -> int:
        """Bytes that have not arrived."""
        return self._size - self.have

    def write(self, data: memoryview) -> int:
        """Add bytes up to the end of the tensor. Returns how many it took."""
        data = data[: self.missing]
        self._file.write(data)
        self._digest.update(data)
        self.have += len(data)
        return len(data)

    def finish(self) -> None:
        """Put the complete tensor in its place."""
        self._file.seek(self._header.index(BLANK.encode()))
        self._file.write(self._digest.hexdigest().encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._part, self._path)

    def close(self) -> None:
        """Leave what has arrived for the next attempt."""
        self._file.close()

    def _resume(self) -> bool:
        """Read what arrived before; False if it is not the beginning of this tensor."""
        left = self._part.stat().st_size - len(self._header)
        if not 0 <= left <= self._size or self._file.read(len(self._header)) != self._header:
            return False
        self.have = left
        while chunk := self._file.read(CHUNK_BYTES):
            self._digest.update(chunk)
        return True


def _part(path: Path) -> Path:
    return path.with_suffix(".part")


def _header(place: TensorBytes) -> bytes:
    entry = {"dtype": place.dtype, "shape": list(place.shape), "data_offsets": [0, place.size]}
    header = json.dumps({"__metadata__": {DIGEST: BLANK}, TENSOR: entry}).encode()
    header += b" " * (-len(header) % LENGTH_BYTES)
    return len(header).to_bytes(LENGTH_BYTES, "little") + header
