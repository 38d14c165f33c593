"""Hold frozen weights in 4 or 8 bits: quantize them with bitsandbytes, and compute with them.

    W (out, in) --quantize--> scales, fp32 | numbers         one tensor of bytes
                              out * in / 64  out * in / 2    nf4: a scale for 64 consecutive numbers
                              out            out * in        int8: a scale for a row

    forward   y = x W~^T          W~ is made from the bytes in the type of x, used and freed, once in the
    backward  dx = dy W~          forward and once in the backward pass: never kept between them

The bytes do not depend on the type of the hidden states, nor on the device: they are computed on the CPU from
the tensor as the checkpoint has it, by operations on single numbers, which round alike everywhere. So parties
with different machines hold the same base. For that reason the scales of nf4 stay in float32: QLoRA's second
quantization begins with their mean, whose rounding depends on the machine. In int8 only weights are
quantized: LLM.int8() also quantizes hidden states, with outliers chosen over the whole batch, so that a
client's result would depend on whose rows are processed with its own.

NF4: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314. int8 by rows: https://arxiv.org/abs/2208.07339.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional

from splitft.errors import ModelError

BLOCK = 64
"""Consecutive numbers that share a scale in 4 bits; bitsandbytes' default, which transformers keeps."""
SLICE = 2**24
"""Weights that are made from their bytes at one time; only matrices as large as output matrices have more."""
CHUNK = 2**20
"""Weights that are quantized or widened at one time, a multiple of BLOCK: a bound of the memory it takes."""
Shape = tuple[int, int]
"""(out, in)."""

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # names a package nobody needs


class Quantizer(Protocol):
    """A way to hold a matrix (out, in) as bytes: scales first, then numbers."""

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the bytes of a matrix (out, in)."""
        ...

    def full(self, held: torch.Tensor, shape: Shape, dtype: torch.dtype, rows: slice) -> torch.Tensor:
        """Return the weights of some rows from the bytes of the matrix, as numbers of a type."""
        ...

    def slices(self, shape: Shape) -> Iterator[slice]:
        """Yield the rows of a matrix, about SLICE weights at a time."""
        ...

    def nbytes(self, shape: Shape) -> int:
        """Return the number of bytes of a matrix."""
        ...


@dataclass(frozen=True)
class FourBit:
    """Numbers of 4 bits, two in a byte, with a scale for each 64 consecutive ones."""

    levels: str
    """bitsandbytes' name of the 16 levels: nf4, or fp4 in some published checkpoints."""

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the bytes of a matrix (out, in), quantized in parts that end with a block."""
        flat = weight.contiguous().view(-1)
        flat = flat if flat.dtype.itemsize < 8 else flat.float()
        held = torch.empty(self.nbytes((1, flat.numel())), dtype=torch.uint8, device=flat.device)
        scales, numbers = parted(held, -(-flat.numel() // BLOCK))
        for number, part in enumerate(torch.split(flat, CHUNK)):
            made, state = library().quantize_4bit(part, blocksize=BLOCK, quant_type=self.levels)
            _write(scales, number * (CHUNK // BLOCK), state.absmax)
            _write(numbers, number * (CHUNK // 2), made.view(-1).view(torch.uint8))
        return held

    def full(self, held: torch.Tensor, shape: Shape, dtype: torch.dtype, rows: slice) -> torch.Tensor:
        """Return the weights of some rows, which begin and end with a block, as numbers of a type."""
        library()  # registers the operation
        (out, inputs), (start, stop, _) = shape, rows.indices(shape[0])
        scales, numbers = parted(held, -(-out * inputs // BLOCK))
        first, last = start * inputs, stop * inputs
        # bitsandbytes' CPU kernel takes wrong scales if rows end within blocks: give it rows that do not
        blocks, left = divmod(last - first, BLOCK)
        whole = (
            (stop - start, inputs) if inputs % BLOCK == 0 else (1, last - first) if left else (blocks, BLOCK)
        )
        made = torch.ops.bitsandbytes.dequantize_4bit.default(
            numbers[first // 2 : (last + 1) // 2],
            scales[first // BLOCK : -(-last // BLOCK)],
            BLOCK,
            self.levels,
            whole,
            dtype if dtype.itemsize < 8 else torch.float32,  # bitsandbytes leaves float64 unfilled
        )
        weights: torch.Tensor = made.view(stop - start, inputs).to(dtype)
        return weights

    def slices(self, shape: Shape) -> Iterator[slice]:
        """Yield multiples of 64 rows, which are whole blocks at any width."""
        yield from _slices(shape, BLOCK, SLICE)

    def nbytes(self, shape: Shape) -> int:
        """Return the number of bytes of a matrix: 4.5 bits a weight."""
        count = shape[0] * shape[1]
        return 4 * -(-count // BLOCK) + -(-count // 2)


@dataclass(frozen=True)
class EightBit:
    """Numbers of 8 bits, with a scale for each row: its largest absolute value, which is 127."""

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the bytes of a matrix (out, in), quantized from float16 as in bitsandbytes."""
        shape, rows = (weight.shape[0], weight.shape[1]), max(1, CHUNK // weight.shape[1])
        held = torch.empty(self.nbytes(shape), dtype=torch.uint8, device=weight.device)
        scales, numbers = self.parts(held, shape)
        for number, part in enumerate(torch.split(weight, rows)):
            made, largest, _ = library().int8_vectorwise_quant(part.to(torch.float16))
            _write(scales, number * rows, largest)
            _write(numbers, number * rows, made.masked_fill_(largest[:, None] == 0, 0))  # 0 / 0 is any number
        return held

    def full(self, held: torch.Tensor, shape: Shape, dtype: torch.dtype, rows: slice) -> torch.Tensor:
        """Return the weights of some rows as numbers of a type."""
        scales, numbers = (one[rows] for one in self.parts(held, shape))
        factors = (scales[:, None] * (1 / 127)).to(torch.promote_types(dtype, torch.float32))
        made = torch.empty(numbers.shape, dtype=dtype, device=held.device)
        for part in _slices((len(numbers), shape[1]), 1, CHUNK):  # on a CPU in two arrays of the wider type
            torch.mul(numbers[part], factors[part], out=made[part])
        return made

    def parts(self, held: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scales (out,) and the numbers (out, in)."""
        scales, numbers = parted(held, shape[0])
        return scales, numbers.view(torch.int8).view(shape)

    def slices(self, shape: Shape) -> Iterator[slice]:
        """Yield as many rows as have about SLICE weights."""
        yield from _slices(shape, 1, SLICE)

    def nbytes(self, shape: Shape) -> int:
        """Return the number of bytes of a matrix."""
        return 4 * shape[0] + shape[0] * shape[1]


def joined(scales: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return scales and numbers as one tensor of bytes."""
    return torch.cat([scales.float().view(-1).view(torch.uint8), numbers.reshape(-1).view(torch.uint8)])


def parted(held: torch.Tensor, scales: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return so many scales, and the bytes after them."""
    return held[: 4 * scales].view(torch.float32), held[4 * scales :]


def _write(whole: torch.Tensor, start: int, part: torch.Tensor) -> None:
    whole[start : start + len(part)] = part


class _Product(torch.autograd.Function):
    """x W~^T + bias, which keeps nothing but the bytes for its backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        held: torch.Tensor,
        bias: torch.Tensor | None,
        kind: Quantizer,
        shape: Shape,
    ) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        ctx.kind, ctx.held, ctx.shape = kind, held, shape
        parts = [
            functional.linear(x, kind.full(held, shape, x.dtype, rows), None if bias is None else bias[rows])
            for rows in kind.slices(shape)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None]:
        """(..., out) -> (..., in)."""
        (dy,), total = grads, None
        if ctx.needs_input_grad[0]:
            for rows in ctx.kind.slices(ctx.shape):
                part = dy[..., rows] @ ctx.kind.full(ctx.held, ctx.shape, dy.dtype, rows)
                total = part if total is None else total + part
        return total, None, None, None, None


def product(
    x: torch.Tensor, held: torch.Tensor, bias: torch.Tensor | None, kind: Quantizer, shape: Shape
) -> torch.Tensor:
    """Return x W~^T + bias with gradients of x alone: (..., in) -> (..., out)."""
    y: torch.Tensor = _Product.apply(x, held, bias, kind, shape)  # type: ignore[no-untyped-call]
    return y


def fingerprint(kind: str) -> tuple[int, str]:
    """Return bytes and SHA-256 of what a fixed matrix becomes when it is quantized.

    Parties with the same tensors and the same fingerprint hold the same bytes. The matrix is made of whole
    numbers and one division, which are the same on every machine: drawn numbers are not.
    """
    shape = (64, 1024)
    count = torch.arange(shape[0] * shape[1], dtype=torch.int64)
    mixed = (count * 2654435761 + (count >> 7) * 40503) % 2**32 - 2**31
    matrix = mixed.float().view(shape) / (torch.arange(1, shape[0] + 1, dtype=torch.float32)[:, None] * 2**31)
    held = QUANTIZERS[kind].quantize(matrix)
    return held.numel(), hashlib.sha256(held.numpy().tobytes()).hexdigest()


def _slices(shape: Shape, multiple: int, weights: int) -> Iterator[slice]:
    out, inputs = shape
    most = max(multiple, weights // inputs // multiple * multiple)
    for start in range(0, out, most):
        yield slice(start, min(out, start + most))


def library() -> Any:
    """Return bitsandbytes' functions. Raises ModelError if it is not installed."""
    try:
        import bitsandbytes.functional as found
    except ImportError as error:
        raise ModelError(
            "quantized weights need bitsandbytes, which is not installed here: pip install 'splitft[quant]', "
            "or set model.quantize: none and model.embedding: full"
        ) from error
    return found


QUANTIZERS: Mapping[str, Quantizer] = {"nf4": FourBit("nf4"), "fp4": FourBit("fp4"), "int8": EightBit()}
"""Every way to hold a matrix, by name; fp4 is read from checkpoints that have it, not made."""
