"""Read single tensors of a checkpoint in safetensors format.

    parameter names --> keys in the checkpoint --> shards --> tensors, digests

A client with two of thirty blocks must not need the memory, the disk or the download for the rest. A
checkpoint is a folder or a hub id (`hub`); a sharded one has `model.safetensors.index.json`, which maps
tensors to shards, so that only the shards in use are opened. Files are memory-mapped by safetensors: a tensor
costs memory when it is first touched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from splitft.errors import ModelError
from splitft.model.weights.digests import file_state, kept_digest, tensor_digests
from splitft.model.weights.tensor_table import table_of

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OLDER_NAMES = {"lm_head.": "embed_out."}
"""Modules that transformers renamed after checkpoints were published: new name -> name in older files."""


class Shard(Protocol):
    """One file of a checkpoint, on this machine or elsewhere."""

    def keys(self) -> Collection[str]:
        """Return the names of its tensors."""

    def read(self, keys: Collection[str]) -> dict[str, torch.Tensor]:
        """Return tensors. Raises ModelError for those that it lacks."""

    def state(self) -> Hashable:
        """Return what tells this content of the file from any other."""

    def sizes(self, keys: Collection[str]) -> dict[str, int]:
        """Return the bytes of tensors."""

    def digests(self, keys: Collection[str]) -> dict[str, str]:
        """Return the SHA-256 of tensors on this machine, read before if necessary."""

    def whole(self) -> tuple[int, str]:
        """Return bytes and SHA-256 of the whole file, as published if this machine has only parts of it."""


@dataclass(frozen=True)
class LocalShard:
    """A whole file on this machine."""

    path: Path

    def keys(self) -> Collection[str]:
        """Return the names of its tensors."""
        with _opened(self.path) as shard:
            return list(shard.keys())

    def read(self, keys: Collection[str]) -> dict[str, torch.Tensor]:
        """Return tensors, in memory that is mapped from the file."""
        with _opened(self.path) as shard:
            absent = set(keys).difference(shard.keys())
            if absent:
                raise ModelError(f"{self.path} lacks {min(absent)!r}, which the index says is there")
            return {key: shard.get_tensor(key) for key in keys}

    def state(self) -> Hashable:
        """Return the file's place and the times of its last changes."""
        return file_state(self.path)

    def sizes(self, keys: Collection[str]) -> dict[str, int]:
        """Return the bytes of tensors."""
        table = table_of(self.path)
        return {key: table[key].size for key in keys}

    def digests(self, keys: Collection[str]) -> dict[str, str]:
        """Return the SHA-256 of tensors."""
        return tensor_digests(self.path, keys)

    def whole(self) -> tuple[int, str]:
        """Return bytes and SHA-256 of the file."""
        return self.path.stat().st_size, kept_digest(self.path)


@dataclass
class Checkpoint:
    """The tensors of one model, readable by name."""

    source: str
    """Folder or hub id, for messages."""
    fetch: Callable[[str], Path | None]
    """File name -> local path of the whole file, downloaded if necessary; None if the model lacks it."""
    prefixes: tuple[str, ...] = ()
    """Prefixes of names that checkpoints may omit, such as `transformer.` for gpt2."""
    open_shard: Callable[[str], Shard | None] | None = None
    """File name -> shard, of which only parts need be on this machine; None for whole files from `fetch`."""
    required: bool = True
    """True if it is an error that there are no weights; else there are no tensors."""
    _file_of: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        index = self.fetch(INDEX)
        if index is not None:
            try:
                self._file_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ModelError(f"{index} does not map tensors to shards: {error!r}") from error
            return
        shard = self._find(WEIGHTS)
        if shard is None and not self.required:
            return
        if shard is None:
            raise ModelError(
                f"{self.source}: no {WEIGHTS} or {INDEX}; splitft reads safetensors only "
                "(convert with transformers' save_pretrained)"
            )
        self._file_of = dict.fromkeys(shard.keys(), WEIGHTS)

    def __contains__(self, name: str) -> bool:
        return self._key_for(name) is not None

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return tensors by the model's own parameter names.

        Raises ModelError for tensors that the checkpoint lacks.
        """
        tensors: dict[str, torch.Tensor] = {}
        for file, wanted in self._by_file(names).items():
            found = self.shard(file).read(wanted.values())
            tensors.update((name, found[key]) for name, key in wanted.items())
        return tensors

    def origins(self, names: Iterable[str]) -> dict[str, Hashable]:
        """Return what tells each tensor from those of other files, and of the same file before a change.

        Raises ModelError for tensors that the checkpoint lacks.
        """
        found: dict[str, Hashable] = {}
        for file, wanted in self._by_file(names).items():
            state = self.shard(file).state()
            found.update((name, (state, key)) for name, key in wanted.items())
        return found

    def digests(self, names: Iterable[str]) -> dict[str, tuple[int, str]]:
        """Return bytes and SHA-256 of tensors by the model's own names; those that it lacks are left out.

        A tensor that is not on this machine yet is read first.
        """
        found: dict[str, tuple[int, str]] = {}
        for file, wanted in self._by_file(name for name in names if name in self).items():
            shard, keys = self.shard(file), list(wanted.values())
            sizes, digests = shard.sizes(keys), shard.digests(keys)
            found.update((name, (sizes[key], digests[key])) for name, key in wanted.items())
        return found

    def files(self, names: Iterable[str]) -> list[str]:
        """Return the files that hold these tensors, sorted; names that the checkpoint lacks are ignored."""
        keys = map(self._key_for, names)
        return sorted({self._file_of[key] for key in keys if key is not None})

    def shard(self, file: str) -> Shard:
        """Return one of the checkpoint's files. Raises ModelError if it is missing."""
        shard = self._find(file)
        if shard is None:
            raise ModelError(f"{self.source}: shard {file} is named in the index but missing")
        return shard

    def _find(self, file: str) -> Shard | None:
        if self.open_shard is not None:
            return self.open_shard(file)
        path = self.fetch(file)
        return None if path is None else LocalShard(path)

    def _by_file(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Return {file: {name: key}}. Raises ModelError for tensors that the checkpoint lacks."""
        keys = {name: self._key_for(name) for name in names}
        missing = sorted(name for name, key in keys.items() if key is None)
        if missing:
            raise ModelError(f"{self.source} lacks {len(missing)} tensors, first {missing[0]!r}")
        by_file: dict[str, dict[str, str]] = {}
        for name, key in keys.items():
            if key is not None:
                by_file.setdefault(self._file_of[key], {})[name] = key
        return by_file

    def _key_for(self, name: str) -> str | None:
        bare = (name.removeprefix(prefix) for prefix in self.prefixes if name.startswith(prefix))
        longer = (prefix + name for prefix in self.prefixes)
        older = (old + name.removeprefix(new) for new, old in OLDER_NAMES.items() if name.startswith(new))
        return next((key for key in (name, *bare, *longer, *older) if key in self._file_of), None)


def in_folder(folder: Path, prefixes: tuple[str, ...] = (), required: bool = True) -> Checkpoint:
    """Return the checkpoint in a local folder; without weights, if they are not `required`, an empty one."""

    def fetch(name: str) -> Path | None:
        path = folder / name
        return path if path.is_file() else None

    return Checkpoint(str(folder), fetch, prefixes, required=required)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from error
