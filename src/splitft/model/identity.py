"""Tell by its content whether a model is the one that a run began with, wherever it lies.

    Model --weight_digests--> {file: SHA-256}      tokenizer --tokenizer_digest--> SHA-256

Every byte of the weights counts: headers and sampled blocks would miss a changed tensor. A file is hashed
once and the digest kept in the user's cache under path, inode, size and the times of its last changes, so
that resuming a model of many GB costs a `stat` for each file. The time of change (ctime) is the system's own:
whoever writes to a file renews it. A disk that alters a file without writing is found where the cache has no
digest of it, as on another machine. A configuration is compared by its settings, since every version of
transformers writes its own number into it; a tokenizer by its vocabulary and what it makes of a sample.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from splitft.cache import KeyedCache, cache_folder
from splitft.errors import ModelError
from splitft.model.source import Model

CONFIG = "config.json"
IGNORED_KEYS = ("transformers_version", "_name_or_path")
"""Keys of a configuration that say who wrote it, not what the model is."""
SAMPLE = "The cat's 12,345 naïve “tests”\n\tdef f(x): return x ** 2  # Ærøskøbing 東京 🙂"
"""Text with what tokenizers treat differently: digits, spaces, accents, quotes, other scripts."""


def weight_digests(model: Model) -> dict[str, str]:
    """Return the SHA-256 of each file with weights of a model, and of the settings in its configuration."""
    names = [name for name, _ in model.skeleton().named_parameters()]
    found = {}
    for name in (*model.checkpoint.files(names), CONFIG):
        path = model.checkpoint.fetch(name)
        if path is None:
            raise ModelError(f"{model.path} has no {name}, which the model needs")
        found[name] = (
            hashlib.sha256(config_content(path)).hexdigest() if name == CONFIG else kept_digest(path)
        )
    return found


def kept_digest(path: Path) -> str:
    """Return the SHA-256 of a file, from the cache if the file has not been touched since."""
    found = path.stat()
    facts = ("sha256", str(path.resolve()), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    cache = KeyedCache(cache_folder() / "digests", str.encode, _hexadecimal, ".sha256")
    key = (*facts, found.st_ctime_ns)
    if (digest := cache.find(key)) is None:
        digest = _digest(path)
        with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
            cache.put(key, digest)
    return digest


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of the vocabulary, and of the tokens of a sample."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    tokens = tokenizer(SAMPLE, return_token_type_ids=False)["input_ids"]
    return hashlib.sha256(json.dumps([vocabulary, tokens]).encode()).hexdigest()


def config_content(path: Path) -> bytes:
    """Return what a configuration says of the model, in one spelling."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    kept = {key: value for key, value in content.items() if key not in IGNORED_KEYS}
    return json.dumps(kept, sort_keys=True).encode()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hexadecimal(data: bytes) -> str:
    text = data.decode()
    if len(text) != 64 or set(text) - set("0123456789abcdef"):
        raise ValueError("no SHA-256")
    return text
