"""Check that site and server have the same frozen base model, tensor by tensor or file by file.

    server: manifest_of, tensors_of --Join--> site: verify_tensors, verify before it loads a tensor

A site hashes only the tensors that its blocks need, and those of the head if it holds it, in whatever files
they are. So it can check what it holds without the rest of the files. Where the server lists no tensors (an
earlier version, or too many of them), and where a site trusts whole files only, files are compared. The
configuration counts too, since the same weights with another rotary base are another model. It is compared by
its content, not byte by byte, since every version of transformers writes its own number into it. The manifest
has the tokenizer's files too (`tokenizer_files`).

A base that is quantized when it is read is the same on both sides if the tensors are, and the quantizers. So
the list of tensors has an entry for each quantizer: what a fixed tensor becomes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from splitft.deploy.tokenizer_files import tokenizer_files
from splitft.errors import ForbiddenError, ModelError
from splitft.model import Model
from splitft.model.anatomy import locate
from splitft.model.identity import CONFIG, config_content
from splitft.model.quantized_layers import saved_parts
from splitft.model.quantized_weights import fingerprint
from splitft.model.weights.digests import kept_digest
from splitft.protocol.control import BaseFile, BaseTensor

MOST_TENSORS = 4096
"""Tensors that fit into the header of a message; of a model with more, the files are compared."""

QUANTIZER = "quantizer:"
"""Begin of the names of entries for ways to quantize; no tensor has a colon in its name."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParameterNames:
    """Names of the parameters, and of the buffers that checkpoints contain, that a client reads."""

    shared: tuple[str, ...]
    """At every cut: embedding, and the head if the client holds it."""
    blocks: tuple[tuple[str, ...], ...]
    """In each block."""

    @classmethod
    def of(cls, model: Model, *, head: bool) -> ParameterNames:
        """Read the names off the model's skeleton."""
        skeleton = model.skeleton()
        anatomy = locate(skeleton)
        names: dict[int, str] = {}
        for name, tensor in skeleton.state_dict(keep_vars=True).items():
            names.setdefault(id(tensor), name)  # a tied output matrix is the embedding

        def within(modules: Iterable[Any]) -> tuple[str, ...]:
            held = (one for module in modules for one in module.state_dict(keep_vars=True).values())
            return tuple(dict.fromkeys(names[id(tensor)] for tensor in held))

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
    """Return every file of the base model and its tokenizer, with size and hash.

    Of a model that is read from the hub in parts, they are those that the hub publishes.
    """
    files = needed(model, ParameterNames.of(model, head=True).at(model.shape.blocks))
    return (*(describe(model, file) for file in files), *tokenizer_files(model))


def tensors_of(model: Model) -> tuple[BaseTensor, ...]:
    """Return every tensor of the base model with size and hash, read for that purpose; none if too many."""
    names = _with_parts(model, ParameterNames.of(model, head=True).at(model.shape.blocks))
    if len(names) > MOST_TENSORS:
        logger.info("%s has %d tensors, too many for a manifest: sites compare files", model.path, len(names))
        return ()
    found = model.checkpoint.digests(names) | _quantizers(model)
    return tuple(BaseTensor(name, size, sha256) for name, (size, sha256) in found.items())


def needed(model: Model, names: Iterable[str]) -> tuple[str, ...]:
    """Return the files that contain these tensors, and the configuration."""
    return (*model.checkpoint.files(_with_parts(model, names)), CONFIG)


def describe(model: Model, name: str) -> BaseFile:
    """Return size and hash of one file of the base model. Raises ModelError if it is missing."""
    if name != CONFIG:
        size, digest = model.checkpoint.shard(name).whole()
        return BaseFile(name=name, size=size, sha256=digest)
    path = model.checkpoint.fetch(name)
    if path is None:
        raise ModelError(f"{model.path} has no {name}, which the model needs")
    data = config_content(path)
    return BaseFile(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def verify_tensors(
    model: Model,
    names: Iterable[str],
    manifest: Sequence[BaseTensor],
    trusted: Mapping[str, str] | None,
) -> list[str]:
    """Compare tensors with the server's. Returns those that have to be compared by file.

    These are tensors that the server does not list, and those that `trusted` does not name. Raises
    ForbiddenError for a tensor that is not the server's, or that the site does not trust.
    """
    on_server = {one.name: one for one in manifest}
    _verify_quantizers(model, on_server)
    names = [name for name in _with_parts(model, names) if name in model.checkpoint]
    alone = [name for name in names if name in on_server and (trusted is None or name in trusted)]
    if trusted is not None:
        for name in alone:
            _require_trust(name, on_server[name].sha256, trusted)
    for name, (size, digest) in model.checkpoint.digests(alone).items():
        expected = on_server[name]
        if (size, digest) != (expected.size, expected.sha256):
            raise ForbiddenError(
                f"tensor {name} of the base model here is not the server's: {size} bytes with SHA-256 "
                f"{digest[:12]}..., {expected.size} bytes with {expected.sha256[:12]}... there; get the same "
                "model on both sides"
            )
    return [name for name in names if name not in set(alone)]


def _verify_quantizers(model: Model, on_server: Mapping[str, BaseTensor]) -> None:
    """Raise ForbiddenError if equal tensors would become other bytes here than on the server."""
    for name, (_, digest) in _quantizers(model.at("clients")).items():
        if name in on_server and on_server[name].sha256 != digest:
            raise ForbiddenError(
                f"{name.removeprefix(QUANTIZER)} weights are rounded otherwise here than on the server, so "
                "the base models would differ: install the same version of bitsandbytes on both sides"
            )


def _quantizers(model: Model) -> dict[str, tuple[int, str]]:
    """Return what stands for the quantized bytes of every tensor: what a fixed tensor becomes."""
    return {f"{QUANTIZER}{kind}": fingerprint(kind) for kind in model.quantizes}


def verify(
    model: Model,
    names: Iterable[str],
    manifest: Sequence[BaseFile],
    trusted: Mapping[str, str] | None,
) -> None:
    """Raise ForbiddenError for a file that is not the server's, or that the site does not trust.

    A file of which this machine has only parts is downloaded whole.
    """
    on_server = {one.name: one for one in manifest}
    for name in names:
        if name not in on_server:
            raise ForbiddenError(
                f"the server's manifest of the base model does not have {name}, which this site reads: both "
                "sides must have the model in the same files"
            )
        expected = on_server[name]
        if trusted is not None:
            _require_trust(name, expected.sha256, trusted)
        own = _whole(model, name)
        if own != expected:
            raise ForbiddenError(
                f"{name} of the base model here is not the server's: {own.size} bytes with SHA-256 "
                f"{own.sha256[:12]}..., {expected.size} bytes with {expected.sha256[:12]}... "
                "there; get the same model on both sides"
            )


def _require_trust(name: str, sha256: str, trusted: Mapping[str, str]) -> None:
    if trusted.get(name) != sha256:
        known = f"trusts {trusted[name][:12]}... there" if name in trusted else "does not list it"
        raise ForbiddenError(
            f"the server has {name} with SHA-256 {sha256[:12]}..., and this site {known} "
            "(model.trusted); check where the file comes from, and add it if it is right"
        )


def _whole(model: Model, name: str) -> BaseFile:
    """Describe a file by its bytes on this machine."""
    path = None if name == CONFIG else model.checkpoint.fetch(name)
    if path is None:
        return describe(model, name)
    return BaseFile(name=name, size=path.stat().st_size, sha256=kept_digest(path))


def _with_parts(model: Model, names: Iterable[str]) -> list[str]:
    """Return tensors with the scales of those that are quantized in the checkpoint."""
    return [one for name in names for one in (name, *saved_parts(model.checkpoint, name))]
