"""Tiny causal language models of real families, built on the spot and saved as a hub would serve them.

    folder/  config.json  model.safetensors (or shards with an index)  tokenizer.json ...

Weights are random but fixed by the family's name. Norms and biases are away from 1 and 0, windows are shorter
than the test texts, and query heads outnumber key heads wherever the family allows it, so that a part that
is lost, doubled or taken from the wrong block shows in the logits.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

WIDTH = 32
WINDOW = 5
"""Tokens that a block with local attention sees."""
END = 0
"""Id of the tokenizer's end token."""
VOCAB = 272
"""Rows of the embedding; the tokenizer uses 257 of them."""

_GROUPED = {"hidden_size": WIDTH, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 8}
_OLDER = {"n_embd": WIDTH, "n_head": 4, "n_positions": 128}


def _alternating(blocks: int) -> list[str]:
    return ["sliding_attention" if block % 2 == 0 else "full_attention" for block in range(blocks)]


def _family_options(family: str, blocks: int) -> dict[str, Any]:
    """What a family's configuration needs beside the sizes that all share."""
    table: dict[str, dict[str, Any]] = {
        "llama": {**_GROUPED, "tie_word_embeddings": False, "attention_bias": True},
        "mistral": {**_GROUPED, "tie_word_embeddings": False, "sliding_window": WINDOW},
        "qwen2": {
            **_GROUPED,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": blocks // 2,
        },
        "qwen3": {**_GROUPED, "tie_word_embeddings": False, "head_dim": 8},
        "gemma": _GEMMA,
        "gemma2": {**_GEMMA, "sliding_window": WINDOW, "layer_types": _alternating(blocks)},
        "gemma3_text": {**_GEMMA, "sliding_window": WINDOW, "layer_types": _alternating(blocks)},
        "phi3": {**_GROUPED, "tie_word_embeddings": False, "sliding_window": WINDOW},
        "gpt_neox": {
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "tie_word_embeddings": False,
            "use_parallel_residual": True,
        },
        "gpt2": {**_OLDER, "n_inner": 48},
        "opt": {"hidden_size": WIDTH, "ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": WIDTH},
        "gpt_neo": {
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_heads": 4,
            "window_size": WINDOW,
            "attention_types": [[["global", "local"], blocks // 2], [["global"], blocks % 2]],
        },
        "olmo2": {**_GROUPED, "tie_word_embeddings": False},
        "falcon": {
            "hidden_size": WIDTH,
            "ffn_hidden_size": 48,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "alibi": False,
            "bias": True,
        },
    }
    return table.get(family, {})


FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_neox",
    "gpt2",
    "opt",
    "gpt_neo",
    "olmo2",
    "falcon",
)


def tiny_model(
    folder: Path,
    family: str,
    dtype: str = "float32",
    blocks: int = 4,
    sharded: bool = False,
    vocab: int = VOCAB,
    **options: Any,
) -> Path:
    """Save a model of `family` with `blocks` blocks in `folder`; `options` go into its configuration."""
    shared = {
        "vocab_size": vocab,
        "num_hidden_layers": blocks,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "bos_token_id": END,
        "eos_token_id": END,
        "pad_token_id": END,
    }
    if family == "gpt_neo":
        shared["num_layers"] = shared.pop("num_hidden_layers")
    config = AutoConfig.for_model(family, **{**shared, **_family_options(family, blocks), **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(family.encode()))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="20KB" if sharded else "1GB")
    return folder


def tiny_tokenizer(folder: Path) -> Path:
    """Save a byte-level tokenizer with an end token in `folder`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": END} | {letter: i + 1 for i, letter in enumerate(letters)}
    rust = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(["<end>"])
    PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<end>", pad_token="<end>").save_pretrained(
        folder
    )
    return folder
