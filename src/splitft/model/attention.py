"""Attention for training in bfloat16 on a CPU: the products in float32.

    q, k, v (B, H, T, d) in bfloat16 -> float32 -> transformers' sdpa -> bfloat16

The backward pass of torch's fused attention is slow on bfloat16 there: for batches as short as those of
fine-tuning, three times slower than on float32, which was a sixth of a whole step
(`benchmarks/step_overhead.py`). Without gradient, on other devices and in other types it is sdpa as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "splitft_sdpa"
"""By this name transformers knows it."""


def train_in_float32(causal_lm: Any) -> None:
    """Let a model that was built with sdpa use this, if its family chooses its attention by name."""
    if causal_lm.config._attn_implementation == "sdpa" and causal_lm._supports_attention_backend:
        causal_lm.set_attn_implementation(NAME)


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    dtype = query.dtype
    if dtype == torch.bfloat16 and query.device.type == "cpu" and query.requires_grad:
        query, key, value = query.float(), key.float(), value.float()
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
    out: torch.Tensor = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    return out.to(dtype), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
