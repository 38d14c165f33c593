"""Read single tensors of a checkpoint in safetensors format, into modules on the meta device.

A client with two of thirty blocks must not need the memory, the disk or the download for the rest. A
checkpoint is a folder or a hub id; a sharded one has `model.safetensors.index.json`, which maps tensors to
shards, so that only the shards in use are opened (and, from the hub, downloaded). Files are memory-mapped by
safetensors: a tensor costs memory when it is first touched, and several segments of one model in one process
share the same pages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from splitft.errors import ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OLDER_NAMES = {"lm_head.": "embed_out."}
"""Modules that transformers renamed after checkpoints were published: new name -> name in older files."""
Place = tuple[nn.Module, str]
"""A module and the name of one of its tensors."""


@dataclass
class Checkpoint:
    """The tensors of one model, readable by name."""

    source: str
    """Folder or hub id, for messages."""
    fetch: Callable[[str], Path | None]
    """File name -> local path, downloaded if necessary; None if the model has no such file."""
    prefixes: tuple[str, ...] = ()
    """Prefixes of names that checkpoints may omit, such as `transformer.` for gpt2."""
    _file_of: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        index = self.fetch(INDEX)
        if index is not None:
            try:
                self._file_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ModelError(f"{index} does not map tensors to shards: {error!r}") from error
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
        """Return tensors by the model's own parameter names.

        Raises ModelError for tensors that the checkpoint lacks.
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
        """Return the files that hold these tensors, sorted; names that the checkpoint lacks are ignored."""
        keys = map(self._key_for, names)
        return sorted({self._file_of[key] for key in keys if key is not None})

    def _key_for(self, name: str) -> str | None:
        bare = (name.removeprefix(prefix) for prefix in self.prefixes if name.startswith(prefix))
        longer = (prefix + name for prefix in self.prefixes)
        older = (old + name.removeprefix(new) for new, old in OLDER_NAMES.items() if name.startswith(new))
        return next((key for key in (name, *bare, *longer, *older) if key in self._file_of), None)


def in_folder(folder: Path, prefixes: tuple[str, ...] = ()) -> Checkpoint:
    """Return the checkpoint in a local folder."""

    def fetch(name: str) -> Path | None:
        path = folder / name
        return path if path.is_file() else None

    return Checkpoint(str(folder), fetch, prefixes)


def on_hub(repo: str, prefixes: tuple[str, ...] = ()) -> Checkpoint:
    """Return a checkpoint on the Hugging Face hub; each file is downloaded to its cache when first needed."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    def fetch(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(repo, name))
        except LocalEntryNotFoundError as error:
            if name == INDEX and isinstance(try_to_load_from_cache(repo, WEIGHTS), str):
                return None  # offline, with an unsharded model that was downloaded before
            raise ModelError(f"{repo}: {name} is neither in the hub cache nor reachable") from error
        except EntryNotFoundError:
            return None
        except HfHubHTTPError as error:
            raise ModelError(f"{repo}: the hub refused {name}: {error}") from error

    return Checkpoint(repo, fetch, prefixes)


class FrozenModule:
    """A module on the meta device whose tensors can be read from a checkpoint, and freed again."""

    def __init__(self, prefix: str, module: nn.Module) -> None:
        self.module = module
        self.places, self.buffers = dict[str, Place](), dict[str, Place]()
        for path, part in module.named_modules(prefix=prefix):
            self.places.update((f"{path}.{name}", (part, name)) for name in _present(part._parameters))
            kept = _present(part._buffers) - part._non_persistent_buffers_set
            self.buffers.update((f"{path}.{name}", (part, name)) for name in kept)

    def fill(self, checkpoint: Checkpoint, dtype: torch.dtype, owner: Any) -> int:
        """Read the tensors, and compute the buffers that checkpoints lack. Returns the bytes of parameters.

        `owner` is the whole model, which knows how to compute buffers. Raises ModelError for missing tensors
        and for shapes that differ.
        """
        for part in self.module.modules():
            fill_buffers(part, owner)
        saved = {name: place for name, place in self.buffers.items() if name in checkpoint}
        tensors = checkpoint.read([*self.places, *saved])
        for name, (part, attribute) in {**self.places, **saved}.items():
            expected: torch.Tensor = getattr(part, attribute)
            if tensors[name].shape != expected.shape:
                wanted, found = tuple(expected.shape), tuple(tensors[name].shape)
                raise ModelError(f"{name} has shape {found} in the checkpoint; the model needs {wanted}")
            if name in saved:
                part._buffers[attribute] = tensors[name].to(expected.dtype)
            else:
                part._parameters[attribute] = nn.Parameter(tensors[name].to(dtype), requires_grad=False)
        return sum(tensors[name].numel() for name in self.places) * dtype.itemsize

    def loaded(self) -> dict[int, int]:
        """Return the sizes of the parameters that are in memory, by identity."""
        parameters = (part._parameters[attribute] for part, attribute in self.places.values())
        return {id(p): p.numel() for p in parameters if p is not None and not p.is_meta}

    def free(self) -> None:
        """Move the parameters back to the meta device, which frees their memory."""
        for part, attribute in self.places.values():
            tensor = part._parameters[attribute]
            if tensor is not None:
                part._parameters[attribute] = nn.Parameter(tensor.to("meta"), requires_grad=False)


def _present(tensors: Mapping[str, torch.Tensor | None]) -> set[str]:
    return {name for name, tensor in tensors.items() if tensor is not None}


def fill_buffers(part: nn.Module, owner: Any) -> None:
    """Compute a module's buffers that checkpoints do not contain (rotary angles, causal masks)."""
    buffers = {name: buffer for name, buffer in part._buffers.items() if buffer is not None}
    if not any(buffer.is_meta for buffer in buffers.values()):
        return
    for name, buffer in buffers.items():
        part._buffers[name] = torch.empty_like(buffer, device="cpu")
    owner._init_weights(part)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}") from error
