"""What tests of quantized bases share: the skip without bitsandbytes, and transformers' quantized model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

KINDS = ("nf4", "int8")

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install 'splitft[quant]'",
)


def bits_config(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> BitsAndBytesConfig:
    """transformers' configuration of the same quantization."""
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype, **options
    )


def quantized_whole(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The whole model as transformers and bitsandbytes load and compute it in training."""
    whole = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=bits_config(kind, dtype, **options)
    )
    return computing_as_in_training(whole)


def computing_as_in_training(whole: Any) -> Any:
    """For inference on CPUs bitsandbytes rounds scales to bfloat16 (4 bits) and hidden states to int8."""
    whole.eval().requires_grad_(False)
    for module in whole.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
        if type(module).__name__ == "Linear8bitLt":
            module.train()
    return whole


def rounded_folder(folder: Path, kind: str, to: Path) -> Path:
    """A full checkpoint in float64 whose linear layers have the weights that the quantized ones stand for."""
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for name, layer in whole.named_modules():
        if type(layer) is torch.nn.Linear and "lm_head" not in name:
            layer.weight.data = rounded(layer.weight.data, kind)
    whole.save_pretrained(to)
    return to


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """The weights that quantized ones stand for, by the definition: levels times scales."""
    import bitsandbytes.functional as library

    if kind == "int8":
        scales = weight.half().abs().amax(1, keepdim=True).float()
        return (weight.half() * (127 / scales)).round().double() * (scales * (1 / 127)).double()
    blocks = weight.float().view(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    levels = library.get_4bit_type(kind, device="cpu")
    between = (levels[1:] + levels[:-1]) / 2
    nearest = torch.bucketize((blocks * (1 / scales)).clamp(-1, 1), between)
    return (levels[nearest] * scales).view(weight.shape).double()
