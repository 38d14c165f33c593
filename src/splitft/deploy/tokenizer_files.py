"""Check that site and server have the same tokenizer, file by file, as a part of the base model's manifest.

    server: tokenizer_files(model) --Join--> site: verify_tokenizer(model, manifest)

The same text with another tokenizer is other tokens, on which the base model is worth nothing. Tools write
the same tokenizer with other settings around it, so JSON files are compared by what decides the tokens:
vocabulary, merges, normalisation and special tokens. A file that only one side has is ignored, as long as
both have one with the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from splitft.errors import ForbiddenError, ModelError
from splitft.model import Model
from splitft.protocol.control import BaseFile

WHOLE = "tokenizer.json"
"""File with a whole tokenizer; beside it others only repeat the vocabulary."""
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
"""Files with settings and special tokens."""
VOCABULARIES = (WHOLE, "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")
"""Files with a vocabulary."""
NO_TOKENS = ("version", "truncation", "padding")
"""Keys of a whole tokenizer that do not decide tokens of a text."""
DECIDING = frozenset({
    "bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token",
    "add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case", "legacy", "split_special_tokens",
})  # fmt: skip
"""Settings that decide tokens."""

logger = logging.getLogger(__name__)


def tokenizer_files(model: Model) -> tuple[BaseFile, ...]:
    """Return the files of a model's tokenizer on this machine, with size and hash of what decides tokens."""
    paths = {name: _find(model, name) for name in (*VOCABULARIES, *SETTINGS)}
    if paths[WHOLE] is not None:
        paths = {name: path for name, path in paths.items() if name in (WHOLE, *SETTINGS)}
    return tuple(_describe(name, path) for name, path in paths.items() if path is not None)


def verify_tokenizer(model: Model, manifest: Sequence[BaseFile]) -> None:
    """Raise ForbiddenError for a file of this site's tokenizer that is not the server's.

    A server without a tokenizer reads no text and needs none: nothing is compared, and the log says so.
    """
    on_server = {one.name: one for one in manifest if one.name in (*VOCABULARIES, *SETTINGS)}
    if not on_server:
        logger.warning("the server has no tokenizer to compare this site's with; its manifest lists none")
        return
    here = {one.name: one for one in tokenizer_files(model)}
    both = [name for name in on_server if name in here]
    if not set(both) & set(VOCABULARIES):
        raise ForbiddenError(
            f"the server's tokenizer is in {', '.join(on_server)}, and this site's in "
            f"{', '.join(here) or 'no file'}; both sides must have it in the same files: get the same model "
            "folder on both"
        )
    for name in both:
        own, expected = here[name], on_server[name]
        if own != expected:
            raise ForbiddenError(
                f"{name} of the tokenizer here is not the server's: {own.size} bytes decide tokens, with "
                f"SHA-256 {own.sha256[:12]}..., {expected.size} with {expected.sha256[:12]}... there; get "
                "the same tokenizer on both sides"
            )


def _find(model: Model, name: str) -> Path | None:
    """Return a file of the tokenizer on this machine, from the hub's cache if the model is there."""
    folder = Path(model.path)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from transformers.utils import cached_file

    found = cached_file(
        model.path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _describe(name: str, path: Path) -> BaseFile:
    """Return the size and hash of what decides tokens in a file. Raises ModelError if it cannot be read."""
    try:
        data = path.read_bytes()
        if name == WHOLE:
            data = _spelled({key: one for key, one in json.loads(data).items() if key not in NO_TOKENS})
        elif name in SETTINGS:
            data = _spelled(_deciding(json.loads(data)))
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path} cannot be read as a file of a tokenizer: {error}") from error
    return BaseFile(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def _deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that decide tokens; a special token by its text alone."""
    kept = {key: value for key, value in settings.items() if key in DECIDING and value is not None}
    return {key: value["content"] if isinstance(value, dict) else value for key, value in kept.items()}


def _spelled(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
