"""Check that site and server have the same frozen base model, file by file.

    server: manifest_of(model) --Join--> site: verify(model, files, manifest, trusted) before a tensor is read

A site hashes only the files that its blocks need, and those of the head if it holds it: of a sharded
checkpoint, a few. The configuration counts too, since the same weights with another rotary base are another
model. It is compared by its content, not byte by byte, since every version of transformers writes its own
number into it. The manifest has the tokenizer's files too (`tokenizer_files`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from splitft.deploy.tokenizer_files import tokenizer_files
from splitft.errors import ForbiddenError, ModelError
from splitft.model import Model
from splitft.model.anatomy import locate
from splitft.model.identity import CONFIG, config_content
from splitft.protocol.control import BaseFile


@dataclass(frozen=True)
class ParameterNames:
    """Names of the parameters that a client reads."""

    shared: tuple[str, ...]
    """At every cut: embedding, and the head if the client holds it."""
    blocks: tuple[tuple[str, ...], ...]
    """In each block."""

    @classmethod
    def of(cls, model: Model, *, head: bool) -> ParameterNames:
        """Read the names off the model's skeleton."""
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
        """Return the names for a client with the blocks [0, cut)."""
        return [*self.shared, *(name for block in self.blocks[:cut] for name in block)]


def manifest_of(model: Model) -> tuple[BaseFile, ...]:
    """Return every file of the base model and its tokenizer on this machine, with size and hash."""
    files = needed(model, ParameterNames.of(model, head=True), model.shape.blocks)
    return (*(describe(model, file) for file in files), *tokenizer_files(model))


def needed(model: Model, names: ParameterNames, cut: int) -> tuple[str, ...]:
    """Return the files that a client with this cut reads."""
    return (*model.checkpoint.files(names.at(cut)), CONFIG)


def describe(model: Model, name: str) -> BaseFile:
    """Return size and hash of one file of the base model. Raises ModelError if it is missing."""
    path = model.checkpoint.fetch(name)
    if path is None:
        raise ModelError(f"{model.path} has no {name}, which the model needs")
    if name == CONFIG:
        data = config_content(path)
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
    """Raise ForbiddenError for a file that is not the server's, or that the site does not trust."""
    on_server = {one.name: one for one in manifest}
    for name in names:
        if name not in on_server:
            raise ForbiddenError(
                f"the server's manifest of the base model does not have {name}, which this site reads: both "
                "sides must have the model in the same files"
            )
        expected = on_server[name]
        if trusted is not None and trusted.get(name) != expected.sha256:
            known = f"trusts {trusted[name][:12]}... there" if name in trusted else "does not list it"
            raise ForbiddenError(
                f"the server has {name} with SHA-256 {expected.sha256[:12]}..., and this site {known} "
                "(model.trusted); check where the file comes from, and add it if it is right"
            )
        own = describe(model, name)
        if own != expected:
            raise ForbiddenError(
                f"{name} of the base model here is not the server's: {own.size} bytes with SHA-256 "
                f"{own.sha256[:12]}..., {expected.size} bytes with {expected.sha256[:12]}... "
                "there; get the same model on both sides"
            )
