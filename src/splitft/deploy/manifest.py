"""Whether both sides have the same frozen base: the server says which files it has, a site compares its own.

    server: manifest_of(model) --Join--> site: verify(model, span, manifest, trusted) before a tensor is read

A site hashes only the files that its span needs, and those of the head where it holds it: with a sharded
checkpoint that is a few of them. The configuration counts too, since the same weights with another rotary
base are another model. It is compared by what it says, not byte by byte, since every version of
transformers writes its own number into it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitft.errors import ForbiddenError, ModelError
from splitft.model import Model
from splitft.model.anatomy import locate
from splitft.protocol.control import BaseFile

CONFIG = "config.json"
WRITTEN_BY_TOOLS = ("transformers_version", "_name_or_path")
"""Keys of a configuration that say who wrote it, and nothing of the model."""


@dataclass(frozen=True)
class Parts:
    """Names of the parameters that a client reads."""

    shared: tuple[str, ...]
    """Whatever its cut: embedding, and the head if it holds it."""
    blocks: tuple[tuple[str, ...], ...]
    """Of each block."""

    @classmethod
    def of(cls, model: Model, *, head: bool) -> Parts:
        """Those of a model, off its skeleton."""
        skeleton = model.skeleton()
        anatomy = locate(skeleton)
        names = {id(parameter): name for name, parameter in skeleton.named_parameters()}

        def within(modules: Iterable[Any]) -> tuple[str, ...]:
            return tuple(names[id(parameter)] for module in modules for parameter in module.parameters())

        blocks = tuple(within([block]) for block in anatomy.block_list())
        elsewhere = {name for block in blocks for name in block}
        if not head:
            after = [getattr(anatomy.trunk, name) for name in (anatomy.norm, *anatomy.after) if name]
            elsewhere |= set(within([*after, *([] if model.shape.tied else [anatomy.head])]))
        return cls(tuple(name for name in names.values() if name not in elsewhere), blocks)

    def at(self, cut: int) -> list[str]:
        """Of a client with the blocks [0, cut)."""
        return [*self.shared, *(name for block in self.blocks[:cut] for name in block)]


def manifest_of(model: Model) -> tuple[BaseFile, ...]:
    """Every file of the base that this machine has, with its size and hash."""
    names = needed(model, Parts.of(model, head=True), model.shape.blocks)
    return tuple(described(model, name) for name in names)


def needed(model: Model, parts: Parts, cut: int) -> tuple[str, ...]:
    """The files that a client with this cut reads."""
    return (*model.checkpoint.files(parts.at(cut)), CONFIG)


def described(model: Model, name: str) -> BaseFile:
    """One file of the base as it lies here. Raises ModelError if it does not."""
    path = model.checkpoint.fetch(name)
    if path is None:
        raise ModelError(f"{model.path} has no {name}, which the model needs")
    if name == CONFIG:
        data = _said(path)
        return BaseFile(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return BaseFile(name=name, size=path.stat().st_size, sha256=digest)


def verify(
    model: Model,
    names: Iterable[str],
    manifest: Sequence[BaseFile],
    trusted: Mapping[str, str] | None,
) -> None:
    """Raise ForbiddenError, naming the file, unless each is the server's and one that the site trusts."""
    theirs = {one.name: one for one in manifest}
    for name in names:
        if name not in theirs:
            raise ForbiddenError(
                f"the server's manifest of the base model does not have {name}, which this site reads: both "
                "sides must have the model in the same files"
            )
        if trusted is not None and trusted.get(name) != theirs[name].sha256:
            known = f"trusts {trusted[name][:12]}... there" if name in trusted else "does not list it"
            raise ForbiddenError(
                f"the server has {name} with SHA-256 {theirs[name].sha256[:12]}..., and this site {known} "
                "(model.trusted); check where the file comes from, and add it if it is right"
            )
        own = described(model, name)
        if own != theirs[name]:
            raise ForbiddenError(
                f"{name} of the base model here is not the server's: {own.size} bytes with SHA-256 "
                f"{own.sha256[:12]}..., {theirs[name].size} bytes with {theirs[name].sha256[:12]}... "
                "there; get the same model on both sides"
            )


def _said(path: Path) -> bytes:
    """What a configuration says of the model, in one spelling."""
    try:
        said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    kept = {key: value for key, value in said.items() if key not in WRITTEN_BY_TOOLS}
    return json.dumps(kept, sort_keys=True).encode()
