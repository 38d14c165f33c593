"""Compute attention in float32 when training in 16 bits on a CPU.

    q, k, v (B, H, T, d) in bfloat16 or float16 -> float32 -> transformers' sdpa -> back

The backward pass of torch's fused attention is slow in bfloat16 on CPUs: three times slower than in float32
for the short batches of fine-tuning, a sixth of a whole step (`benchmarks/step_overhead.py`). Without a
gradient, on other devices and in other types it is sdpa unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "splitft_sdpa"
"""Name in transformers' registry of attention functions."""


def train_in_float32(causal_lm: Any) -> None:
    """Use this attention in a model built with sdpa, if its family chooses attention by name."""
    if causal_lm.config._attn_implementation == "sdpa" and causal_lm._supports_attention_backend:
        causal_lm.set_attn_implementation(NAME)


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    dtype = query.dtype
    if dtype in (torch.bfloat16, torch.float16) and query.device.type == "cpu" and query.requires_grad:
        query, key, value = query.float(), key.float(), value.float()
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
    out: torch.Tensor = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    return out.to(dtype), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
