"""Hash files and single tensors, and keep the digests until the file is touched.

    file --kept_digest--> SHA-256          file, tensors --tensor_digests--> {tensor: SHA-256}

A file is hashed once and the digest kept in the user's cache under path, inode, size and the times of its
last changes, so that resuming a model of many GB costs a `stat` for each file. The time of change (ctime) is
the system's own: whoever writes to a file renews it. A disk that alters a file without writing is found where
the cache has no digest of it, as on another machine. The digest of a tensor covers its type, shape and bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from splitft.cache import KeyedCache, cache_folder
from splitft.errors import ModelError
from splitft.model.weights.tensor_table import TensorBytes, table_of

CHUNK_BYTES = 2**20


def file_state(path: Path) -> tuple[object, ...]:
    """Return what changes whenever somebody writes to a file."""
    found = path.stat()
    times = (found.st_mtime_ns, found.st_ctime_ns)
    return (str(path.resolve()), found.st_dev, found.st_ino, found.st_size, *times)


def kept_digest(path: Path) -> str:
    """Return the SHA-256 of a file, from the cache if the file has not been touched since."""
    cache = KeyedCache(cache_folder() / "digests", str.encode, _hexadecimal, ".sha256")
    key = ("sha256", *file_state(path))
    if (digest := cache.find(key)) is None:
        digest = _digest(path)
        with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
            cache.put(key, digest)
    return digest


def tensor_digests(path: Path, keys: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of tensors in a file, from the cache for those that were hashed before.

    Raises ModelError for a file that cannot be read or lacks one of them.
    """
    cache = KeyedCache(cache_folder() / "digests", _dump, _load, ".tensors.json")
    facts, keys = ("tensors", *file_state(path)), list(keys)
    known = cache.find(facts) or {}
    if new := [key for key in keys if key not in known]:
        table = table_of(path)
        if absent := [key for key in new if key not in table]:
            raise ModelError(f"{path} lacks {absent[0]!r}, which the index says is there")
        with path.open("rb") as file:
            known |= {key: _tensor_digest(file, table[key]) for key in new}
        with contextlib.suppress(OSError):
            cache.put(facts, known)
    return {key: known[key] for key in keys}


def _tensor_digest(file: BinaryIO, place: TensorBytes) -> str:
    digest, left = hashlib.sha256(place.preamble()), place.size
    file.seek(place.start)
    while chunk := file.read(min(CHUNK_BYTES, left)):
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hexadecimal(data: bytes) -> str:
    text = data.decode()
    if len(text) != 64 or set(text) - set("0123456789abcdef"):
        raise ValueError("no SHA-256")
    return text


def _dump(digests: dict[str, str]) -> bytes:
    return json.dumps(digests).encode()


def _load(data: bytes) -> dict[str, str]:
    return {str(key): _hexadecimal(value.encode()) for key, value in json.loads(data).items()}
