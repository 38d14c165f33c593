"""Replace the linear layers of a skeleton by layers whose weights are held in fewer bits.

    skeleton on meta --quantize_layers--> blocks: Linear, Conv1D -> QuantizedLinear     model.quantize
                                          embedding, output matrix -> rows in int8      model.embedding
    checkpoint --fill--> each tensor quantized as it is read, or read with its scales if it is quantized there

Norms, biases and position tables keep the type of the hidden states. Layers are replaced on the meta device,
before adapters are attached, so that only the tensors of the blocks that a segment holds are read and
quantized. As in transformers, layers of other classes than Linear and Conv1D keep their weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from splitft.errors import ModelError
from splitft.model.anatomy import locate
from splitft.model.devices import CPU
from splitft.model.quantized_weights import (
    BLOCK,
    QUANTIZERS,
    SLICE,
    EightBit,
    Shape,
    joined,
    library,
    product,
)
from splitft.model.weights import Checkpoint


class QuantizedLinear(nn.Linear):
    """A frozen linear layer; its weight has the shape of the checkpoint's on meta, and is bytes when held."""

    def __init__(self, layer: Any, kind: str) -> None:
        """Replace `layer`, which is on meta; the weight of a Conv1D is (in, out) in checkpoints."""
        transposed = not isinstance(layer, nn.Linear)
        width_out, width_in = reversed(layer.weight.shape) if transposed else layer.weight.shape
        super().__init__(width_in, width_out, bias=False, device="meta")
        self.kind, self.transposed = kind, transposed
        self.weight, self.bias = layer.weight, layer.bias

    @property
    def full_shape(self) -> Shape:
        """(out, in)."""
        return self.out_features, self.in_features

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        return product(input, self.weight, self.bias, QUANTIZERS[self.kind], self.full_shape)

    def full_weight(self) -> torch.Tensor:
        """Return the weight (out, in) as float32, for norms."""
        kind, shape = QUANTIZERS[self.kind], self.full_shape
        return kind.full(self.weight, shape, torch.float32, slice(None))


class QuantizedRows(nn.Embedding):
    """An embedding whose rows are held in int8; bytes when held."""

    kind, transposed = "int8", False
    dtype: torch.dtype

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(...) -> (..., D)."""
        scales, numbers = EightBit().parts(self.weight, (self.num_embeddings, self.embedding_dim))
        rows = functional.embedding(input, numbers)
        return rows.to(self.dtype).mul_(scales[input][..., None] * (1 / 127))


@dataclass(frozen=True)
class QuantizedForm:
    """Form of a tensor in fewer bits on a device; see `splitft.model.weights.WeightForm`."""

    kind: str
    """A name in QUANTIZERS."""
    transposed: bool
    """True if the checkpoint has (in, out)."""
    device: torch.device

    def hold(self, tensor: torch.Tensor) -> nn.Parameter:
        """Return a tensor of the checkpoint, or the bytes that `read_bytes` made of one, frozen."""
        if tensor.dim() == 2:
            tensor = QUANTIZERS[self.kind].quantize(tensor.T if self.transposed else tensor)
        return nn.Parameter(tensor.to(self.device), requires_grad=False)

    def on(self, device: torch.device) -> QuantizedForm:
        """Return the same form on another device."""
        return replace(self, device=device)


def quantized_form(module: nn.Module, name: str, device: torch.device) -> QuantizedForm | None:
    """Return the form of one of a module's tensors; None if it is held as numbers of the usual type."""
    if isinstance(module, QuantizedLinear | QuantizedRows) and name == "weight":
        return QuantizedForm(module.kind, module.transposed, device)
    return None


def quantize_layers(
    causal_lm: Any, blocks: str | None, rows: bool, fits: Callable[[str], object] = lambda name: True
) -> Any:
    """Replace layers of a skeleton: linear ones of the blocks by `blocks`, embedding and head with `rows`.

    Of the blocks' layers, those whose weight's name `fits`. Raises ModelError for a family without any.
    """
    anatomy = locate(causal_lm)
    names = {module: name for name, module in causal_lm.named_modules()}
    if blocks is not None:
        linear = (layer for block in anatomy.block_list() for layer in block.modules() if _linear(layer))
        layers = [layer for layer in linear if fits(f"{names[layer]}.weight")]
        if not layers:
            family = causal_lm.config.model_type
            raise ModelError(
                f"model.quantize: family {family!r} has no layers of torch's Linear or transformers' Conv1D, "
                "which are those that can be quantized; set it to none"
            )
        for layer in layers:
            causal_lm.set_submodule(names[layer], QuantizedLinear(layer, blocks))
    if rows:
        if not _linear(anatomy.head):
            raise ModelError(
                f"model.embedding: the output matrix is a {type(anatomy.head).__name__}; set full"
            )
        _hold_rows(anatomy.embedding)
        causal_lm.set_submodule(names[anatomy.head], QuantizedLinear(anatomy.head, "int8"))
    return causal_lm


def bytes_a_weight(module: nn.Module, full: float) -> float:
    """Return the mean bytes of a weight of a skeleton's module, of which those in full take `full`."""
    held = count = 0.0
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            count += parameter.numel()
            if form := quantized_form(part, name, CPU):
                shape = tuple(reversed(parameter.shape)) if form.transposed else tuple(parameter.shape)
                held += QUANTIZERS[form.kind].nbytes((shape[0], shape[1]))
            else:
                held += parameter.numel() * full
    return held / max(1.0, count)


def largest_made(module: nn.Module) -> int:
    """Return the most weights that a skeleton's module makes from their bits at one time."""
    sizes = (part.weight.numel() for part in module.modules() if isinstance(part, QuantizedLinear))
    return min(SLICE, max(sizes, default=0))


def read_bytes(checkpoint: Checkpoint, name: str, form: QuantizedForm) -> torch.Tensor:
    """Return a tensor as the checkpoint has it, or its bytes if it is quantized there.

    Raises ModelError if it is quantized there in another way.
    """
    if not (parts := saved_parts(checkpoint, name)):
        return checkpoint.read([name])[name]
    found = checkpoint.read([name, *parts])
    weight = found.pop(name)
    if f"{name.removesuffix('weight')}SCB" in found:
        _check_kind(name, "int8", BLOCK, form)
        return joined(found.pop(f"{name.removesuffix('weight')}SCB"), weight)
    state = library().QuantState.from_dict(
        {key.removeprefix(f"{name}."): one for key, one in found.items()}, device=CPU
    )
    _check_kind(name, state.quant_type, state.blocksize, form)
    return state_bytes(state, weight)


def state_bytes(state: Any, weight: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a weight of 4 bits from bitsandbytes' QuantState and packed numbers."""
    scales = state.absmax
    if state.nested:  # QLoRA's second quantization: scales in 8 bits
        scales = library().dequantize_blockwise(scales, state.state2) + state.offset
    return joined(scales, weight)


def layer_weight(
    checkpoint: Checkpoint, name: str, layer: Any, kind: str | None, dtype: torch.dtype
) -> torch.Tensor:
    """Return the weight (out, in) of a skeleton's layer as numbers of a type, quantized first to a `kind`."""
    transposed = not isinstance(layer, nn.Linear)
    if kind is None:
        weight = checkpoint.read([name])[name].to(dtype)
        return weight.T if transposed else weight
    form = QuantizedForm(kind, transposed, CPU)
    width_out, width_in = reversed(layer.weight.shape) if transposed else layer.weight.shape
    held = form.hold(read_bytes(checkpoint, name, form))
    return QUANTIZERS[kind].full(held, (width_out, width_in), dtype, slice(None))


def saved_parts(checkpoint: Checkpoint, name: str) -> list[str]:
    """Return the names of the tensors that belong to a weight, if it is quantized in the checkpoint."""
    four_bit = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    suffixes = (*four_bit, *(f"quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")))
    names = (f"{name.removesuffix('weight')}SCB", *(f"{name}.{suffix}" for suffix in suffixes))
    return [one for one in names if one in checkpoint]


def saved_kind(path: str, config: Any) -> str | None:
    """Return how a checkpoint is quantized according to its configuration; None if it is not.

    Raises ModelError for a library or a kind that cannot be read.
    """
    given = getattr(config, "quantization_config", None)
    if not given:
        return None
    found = given if isinstance(given, dict) else given.to_dict()
    if found.get("load_in_8bit"):
        kind = "int8"
    elif found.get("load_in_4bit"):
        kind = str(found.get("bnb_4bit_quant_type", "fp4"))
    else:
        kind = str(found.get("quant_method") or json.dumps(found, default=str))
    if kind not in QUANTIZERS:
        raise ModelError(
            f"{path} has weights quantized by {kind}; splitft reads those of bitsandbytes "
            f"({', '.join(QUANTIZERS)}): give the original model, and set model.quantize"
        )
    return kind


def _check_kind(name: str, kind: str, block: int, form: QuantizedForm) -> None:
    if kind != form.kind or block != BLOCK:
        raise ModelError(
            f"{name} is quantized to {kind} in blocks of {block} in the checkpoint, whose configuration says "
            f"{form.kind}, and bitsandbytes' blocks are {BLOCK}"
        )


def _linear(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear or type(layer).__name__ == "Conv1D"


def _hold_rows(embedding: Any) -> None:
    """Make an embedding, which may be of a family's own class that calls Embedding's forward, hold int8."""
    dtype, family = embedding.weight.dtype, type(embedding)
    bases = (QuantizedRows,) if family is nn.Embedding else (family, QuantizedRows)
    embedding.__class__ = type(f"Quantized{family.__name__}", bases, {"dtype": dtype})
