"""Make checkpoints of given sizes with random weights, as a hub would serve them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LLAMA_1B: Mapping[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
"""1.1 billion parameters."""
LLAMA_8B: Mapping[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
"""Llama-3.1-8B."""
SMALL: Mapping[str, Any] = {
    "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1000, "tie_word_embeddings": False,
}  # fmt: skip
"""For a quick check."""


def random_checkpoint(
    folder: Path, sizes: Mapping[str, Any], shards: int, dtype: str = "bfloat16", seed: int = 0
) -> int:
    """Save a llama with random weights in this many shards, or keep the one that is there; return its
    parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", max_position_embeddings=4096, **sizes)
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(config)
    parameters: int = sum(parameter.numel() for parameter in meta.parameters())
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        most = int(1.08 * parameters * getattr(torch, dtype).itemsize / shards)  # a shard holds whole tensors
        model.save_pretrained(folder, max_shard_size=most)
    files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    if len(files) != shards:
        raise SystemExit(f"{folder} has {len(files)} shards instead of {shards}; delete it, or give another")
    return parameters
