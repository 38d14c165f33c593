"""Load a whole model with transformers, for peft, on the base that a run's segments hold.

    Model --load_whole--> transformers' model on the CPU, with bitsandbytes' layers if it is quantized

Outside training bitsandbytes computes faster and less exactly on CPUs: 4 bits with scales in bfloat16, 8 bits
with hidden states in int8. `compute_as_in_training` prevents that, so that an adapter is evaluated on the
base on which it was trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from splitft.errors import ModelError
from splitft.model.quantized_layers import state_bytes
from splitft.model.quantized_weights import BLOCK, QUANTIZERS
from splitft.model.source import Model


def load_whole(model: Model, full: bool = False) -> Any:
    """Return the whole model in evaluation mode; with `full`, the checkpoint's weights without quantization.

    Blocks that only one side quantizes (`model.quantize_at`) are in full too. Raises ModelError if the model
    cannot be loaded, or has no weights in full.
    """
    from transformers import AutoModelForCausalLM

    if full and model.quantized_on_disk:
        raise ModelError(
            f"{model.path} has {model.quantized} weights only, and rounding would spoil an update that is "
            "folded into them: export the adapter alone, and fold it into the model that was quantized"
        )
    kind = None if full or model.spec.quantize_at != "both" else model.quantized
    given = {"quantization_config": bits_config(kind, model.dtype)} if kind else {}
    if model.quantized_on_disk:
        given = {}  # transformers finds it in the checkpoint's configuration
    try:
        whole = AutoModelForCausalLM.from_pretrained(model.path, dtype=model.dtype, **given)
    except OSError as error:
        raise ModelError(f"the base model {model.path} cannot be loaded: {error}") from error
    if model.spec.embedding == "int8" and not full:
        for matrix in {whole.get_input_embeddings().weight, whole.get_output_embeddings().weight}:
            matrix.data = _rounded_rows(matrix.data)
    return compute_as_in_training(whole.eval())


def bits_config(kind: str, dtype: torch.dtype) -> Any:
    """Return transformers' configuration of the quantization that segments have."""
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype)


def compute_as_in_training(whole: Any) -> Any:
    """Make bitsandbytes' layers of a model in evaluation mode compute as in training; returns the model."""
    for name, module in list(whole.named_modules()):
        if type(module).__name__ == "Linear8bitLt" and not hasattr(module, "base_layer"):
            module.train()
        if type(module).__name__ == "Linear4bit" and not hasattr(module, "base_layer"):
            module.support_avx512bf16_for_cpu = False
            if module.in_features % BLOCK:  # where rows end within blocks, its CPU kernel takes wrong scales
                whole.set_submodule(name, _in_full(module))
    return whole


def _in_full(layer: Any) -> nn.Linear:
    """Return a linear layer with the numbers that a layer of 4 bits stands for."""
    state, shape = layer.weight.quant_state, (layer.out_features, layer.in_features)
    held = state_bytes(state, layer.weight.data)
    made = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    weight = QUANTIZERS[state.quant_type].full(held, shape, state.dtype, slice(None))
    made.weight, made.bias = nn.Parameter(weight, requires_grad=False), layer.bias
    return made


def _rounded_rows(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix as its rows in int8 stand for it."""
    kind, shape = QUANTIZERS["int8"], (matrix.shape[0], matrix.shape[1])
    return kind.full(kind.quantize(matrix), shape, matrix.dtype, slice(None))
