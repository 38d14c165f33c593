"""Read only the tensors that are asked for from a checkpoint in safetensors format.

A client with two of thirty blocks must not need the memory, the disk or the download for the rest.
A checkpoint is a folder or a hub id; sharded ones bring `model.safetensors.index.json`, which tells
in which shard a tensor lives, so that only those shards are opened (and, from the hub, downloaded).
Files are memory-mapped by safetensors: a tensor costs memory when it is first touched, and several
segments of one model in one process share the same pages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from splitft.errors import ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OLDER_NAMES = {"lm_head.": "embed_out."}
"""Parts that transformers renamed after checkpoints were published: new name -> name in older files."""


@dataclass
class Checkpoint:
    """The tensors of one model, readable by name."""

    source: str
    """Folder or hub id, for messages."""
    fetch: Callable[[str], Path | None]
    """File name -> local path, downloading it if need be; None if the model has no such file."""
    prefixes: tuple[str, ...] = ()
    """Leading parts of names that checkpoints may leave out, such as `transformer.` for gpt2."""
    _file_of: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        index = self.fetch(INDEX)
        if index is not None:
            try:
                self._file_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ModelError(
                    f"{index} does not tell which shard holds which tensor: {error!r}"
                ) from error
            return
        weights = self.fetch(WEIGHTS)
        if weights is None:
            raise ModelError(
                f"{self.source}: no {WEIGHTS} or {INDEX}; splitft reads safetensors only "
                "(convert with transformers' save_pretrained)"
            )
        with _opened(weights) as shard:
            self._file_of = dict.fromkeys(shard.keys(), WEIGHTS)

    def __contains__(self, name: str) -> bool:
        return self._key_for(name) is not None

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors by the model's own parameter names.

        Raises ModelError naming the tensors that the checkpoint lacks.
        """
        keys = {name: self._key_for(name) for name in names}
        missing = sorted(name for name, key in keys.items() if key is None)
        if missing:
            raise ModelError(f"{self.source} lacks {len(missing)} tensors, first {missing[0]!r}")
        by_file: dict[str, list[tuple[str, str]]] = {}
        for name, key in keys.items():
            if key is not None:
                by_file.setdefault(self._file_of[key], []).append((name, key))
        tensors: dict[str, torch.Tensor] = {}
        for file, wanted in by_file.items():
            path = self.fetch(file)
            if path is None:
                raise ModelError(f"{self.source}: shard {file} is named in the index but missing")
            with _opened(path) as shard:
                absent = {key for _, key in wanted}.difference(shard.keys())
                if absent:
                    raise ModelError(f"{path} lacks {min(absent)!r}, which the index says is there")
                tensors.update((name, shard.get_tensor(key)) for name, key in wanted)
        return tensors

    def files(self, names: Iterable[str]) -> list[str]:
        """The files that hold these tensors, sorted; names that the checkpoint lacks are in none."""
        keys = map(self._key_for, names)
        return sorted({self._file_of[key] for key in keys if key is not None})

    def _key_for(self, name: str) -> str | None:
        bare = (name.removeprefix(prefix) for prefix in self.prefixes if name.startswith(prefix))
        longer = (prefix + name for prefix in self.prefixes)
        older = (old + name.removeprefix(new) for new, old in OLDER_NAMES.items() if name.startswith(new))
        return next((key for key in (name, *bare, *longer, *older) if key in self._file_of), None)


def in_folder(folder: Path, prefixes: tuple[str, ...] = ()) -> Checkpoint:
    """A checkpoint in a local folder."""

    def fetch(name: str) -> Path | None:
        path = folder / name
        return path if path.is_file() else None

    return Checkpoint(str(folder), fetch, prefixes)


def on_hub(repo: str, prefixes: tuple[str, ...] = ()) -> Checkpoint:
    """A checkpoint on the Hugging Face hub; files come through its cache, each when first needed."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    def fetch(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(repo, name))
        except LocalEntryNotFoundError as error:
            if name == INDEX and isinstance(try_to_load_from_cache(repo, WEIGHTS), str):
                return None  # offline, with a model in one file that was downloaded before
            raise ModelError(f"{repo}: {name} is neither in the hub cache nor reachable") from error
        except EntryNotFoundError:
            return None
        except HfHubHTTPError as error:
            raise ModelError(f"{repo}: the hub refused {name}: {error}") from error

    return Checkpoint(repo, fetch, prefixes)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from error
