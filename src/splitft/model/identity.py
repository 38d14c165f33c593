"""Tell by its content whether a model is the one that a run began with, wherever it lies.

    Model --weight_digests--> {file: SHA-256}      tokenizer --tokenizer_digest--> SHA-256

Every byte of the weights counts: headers and sampled blocks would miss a changed tensor. Digests of files are
kept until somebody touches the file (`weights.digests`). Of a model that is read from the hub in parts, the
digests are those that the hub publishes. A configuration is compared by its settings, since every version of
transformers writes its own number into it; a tokenizer by its vocabulary and what it makes of a sample.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

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
    files = model.checkpoint.files(names)
    found = {name: model.checkpoint.shard(name).whole()[1] for name in files}
    path = model.checkpoint.fetch(CONFIG)
    if path is None:
        raise ModelError(f"{model.path} has no {CONFIG}, which the model needs")
    return found | {CONFIG: hashlib.sha256(config_content(path)).hexdigest()}


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
