"""Codecs of small integers: numbers in groups of up to 64 share a scale.

    rows = mean + outlier channels + rest, the first two in bfloat16
    int8   code = round(rest / s), s = max|rest| / 127                   1 byte and 1/64
    int4   rest rotated; code = round(rest / s + 7.5), s = max / 7.5     half a byte and 1/64
    int2   the same with 4 levels, s = max(max / 2.5, rms)               a quarter of a byte and 1/64

A few channels and the mean row carry most of the energy of hidden states, and would cause most of the error
if all numbers shared a scale. The rotation (`rotation`) evens out the rest. Gradients are rounded at random
by a seeded generator, right on average, so that errors cancel over steps; int2 rounds to the nearest and
relies on error feedback instead. Scales are powers of 2^(1/8), rounded up, in one byte, relative to the
largest of the message.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from splitft.codecs.encoded import CodecContext, Encoded, Parameter, StoredPart
from splitft.codecs.error_feedback import ErrorFeedback
from splitft.codecs.rotation import (
    as_rows,
    attention_sinks,
    grouped,
    groups_of,
    rotated,
    rotated_back,
    sizes,
    ungrouped,
)
from splitft.errors import WireError

CHUNK = 4096
"""Groups quantized at a time on a CPU, so that their numbers stay in its cache."""
OUTLIER_CHANNELS = 4
"""Outlier channels of a row of 128 numbers or more."""
_TINY = 1e-30


@dataclass(frozen=True)
class Int8:
    """One byte for each number; a single row, as adapters are, has no mean and no outlier channels."""

    name: str = "int8"

    def bytes_for(self, shape: tuple[int, ...]) -> float:
        """Return the payload of a tensor of this shape."""
        return float(sum(part.nbytes for part in self.layout(shape, {"top": 0}).values()))

    def layout(self, shape: tuple[int, ...], parameters: Mapping[str, Parameter]) -> dict[str, StoredPart]:
        """Return codes (N, D), a scale for each group, the mean (D,), outlier channels and their indices."""
        top_of(parameters)
        rows, width = sizes(shape)
        return {
            "codes": StoredPart(torch.int8, (rows, width)),
            "scales": StoredPart(torch.uint8, (rows * groups_of(width)[0],)),
            **_outlier_layout(rows, width, single_row=False),
        }

    def encode(self, tensor: torch.Tensor, context: CodecContext) -> Encoded:
        """Separate mean and outlier channels, and round the rest; at random if it must be unbiased."""
        rows = as_rows(tensor)
        rest, parts = _without_outliers(rows, single_row=False)
        groups = grouped(rest)
        # scales; `buffer` is reused so that a chunk stays in the cache
        chunks = _chunks(groups)
        buffer = torch.empty_like(groups[chunks[0]] if chunks else groups)
        largest = groups.new_empty(len(groups))
        for chunk in chunks:
            largest[chunk] = torch.abs(groups[chunk], out=buffer[: len(groups[chunk])]).amax(1)
        scales, top = scale_bytes(largest / 127)
        # codes
        per_step = 1 / steps_of(scales, top)[:, None]
        codes = torch.empty_like(groups, dtype=torch.int8)
        noise = context.uniform(groups) if context.unbiased else None
        for chunk in chunks:
            work = torch.mul(groups[chunk], per_step[chunk], out=buffer[: len(groups[chunk])])
            if noise is None:
                work.round_()
            else:
                work.add_(noise[chunk]).floor_()
            codes[chunk].copy_(work.clamp_(-127, 127))
        parts |= {"codes": ungrouped(codes, rows.shape[1]).contiguous(), "scales": scales}
        return Encoded(context.role, self.name, tensor.dtype, tuple(tensor.shape), parts, {"top": top})

    def decode(self, encoded: Encoded, dtype: torch.dtype, context: CodecContext) -> torch.Tensor:
        """Multiply codes by scales, and add mean and outlier channels."""
        codes, scales = encoded.parts["codes"], steps_of(encoded.parts["scales"], top_of(encoded.parameters))
        width = codes.shape[1]
        count, size = groups_of(width)
        if count * size == width:
            rest = torch.mul(codes.reshape(-1, size), scales[:, None]).reshape(codes.shape)
        else:
            rest = codes * scales.reshape(-1, count).repeat_interleave(size, 1)[:, :width]
        return _with_outliers(rest, encoded.parts).reshape(encoded.shape).to(dtype)

    def error_bound(self, encoded: Encoded, context: CodecContext) -> torch.Tensor:
        """Return (N,) bounds: half a step for each number, a whole step if rounding was random."""
        return _row_bound(encoded, 1.0 if encoded.role == "gradient" else 0.5)


@dataclass(frozen=True)
class Packed:
    """Four or two bits for each number of the rotated rest."""

    bits: int
    """4 or 2."""

    @property
    def name(self) -> str:
        """`int4` or `int2`."""
        return f"int{self.bits}"

    @property
    def levels(self) -> int:
        """Number of different codes."""
        return int(2**self.bits)

    def bytes_for(self, shape: tuple[int, ...]) -> float:
        """Return the payload of a tensor of this shape."""
        return float(sum(part.nbytes for part in self.layout(shape, {"top": 0}).values()))

    def layout(self, shape: tuple[int, ...], parameters: Mapping[str, Parameter]) -> dict[str, StoredPart]:
        """Return packed codes, a scale for each group, the mean, outlier channels and their indices."""
        top_of(parameters)
        rows, width = sizes(shape)
        count, size = groups_of(width)
        return {
            "codes": StoredPart(torch.uint8, (-(-rows * count * size // (8 // self.bits)),)),
            "scales": StoredPart(torch.uint8, (rows * count,)),
            **_outlier_layout(rows, width),
        }

    def encode(self, tensor: torch.Tensor, context: CodecContext) -> Encoded:
        """Separate mean and outlier channels, rotate the rest, and round it."""
        rows = as_rows(tensor)
        rest, parts = _without_outliers(rows)
        groups = grouped(rotated(rest))
        scales, top = scale_bytes(self._steps(groups))
        steps, middle = steps_of(scales, top), (self.levels - 1) / 2
        codes = torch.empty_like(groups, dtype=torch.uint8)
        noise = context.uniform(groups) if context.unbiased and self.bits > 2 else None
        for chunk in _chunks(groups):
            work = groups[chunk] * (1 / steps[chunk, None])
            work += middle + 0.5 if noise is None else middle + noise[chunk]
            codes[chunk] = work.clamp_(0, self.levels - 1)  # truncation is floor: nothing is negative
        parts |= {"codes": pack_bits(codes.reshape(-1), self.bits), "scales": scales}
        return Encoded(context.role, self.name, tensor.dtype, tuple(tensor.shape), parts, {"top": top})

    def decode(self, encoded: Encoded, dtype: torch.dtype, context: CodecContext) -> torch.Tensor:
        """Invert `encode`."""
        rows, width = sizes(encoded.shape)
        count, size = groups_of(width)
        codes = unpack_bits(encoded.parts["codes"], self.bits, rows * count * size).reshape(-1, size)
        groups = (codes.float() - (self.levels - 1) / 2) * steps_of(
            encoded.parts["scales"], top_of(encoded.parameters)
        )[:, None]
        rest = rotated_back(ungrouped(groups, width))
        return _with_outliers(rest, encoded.parts).reshape(encoded.shape).to(dtype)

    def error_bound(self, encoded: Encoded, context: CodecContext) -> torch.Tensor:
        """Return (N,) bounds: int4 half a step, a whole one if random; int2 at most a step."""
        return _row_bound(encoded, 0.5 if self.bits > 2 and encoded.role != "gradient" else 1.0)

    def _steps(self, groups: torch.Tensor) -> torch.Tensor:
        """Return each group's step, from its largest number, and from its rms if levels are few."""
        largest = groups.abs().amax(1)
        if self.bits == 2:
            return torch.maximum(largest / 2.5, groups.square().mean(1).sqrt_())
        return largest * (2 / (self.levels - 1))


def int2() -> ErrorFeedback:
    """Return the codec `int2`, whose errors are corrected in later messages."""
    return ErrorFeedback(Packed(2))


def scale_bytes(steps: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return positive steps as bytes, and `top`, the power of two that the largest byte stands for.

    Step = 2^(top + (byte - 255) / 8), rounded up; steps below 2^-31 of the largest are raised to that.
    """
    largest = float(steps.max()) if len(steps) else 0.0
    top = math.ceil(math.log2(largest)) if largest > _TINY else LOWEST_TOP
    eighths = torch.log2(steps.clamp_min(_TINY)).sub_(top).mul_(8).sub_(1e-3).ceil_()
    return (eighths + 255).clamp_(0, 255).to(torch.uint8), top


def steps_of(scales: torch.Tensor, top: int) -> torch.Tensor:
    """Return the steps that bytes stand for."""
    return (_eighths(scales.device) * 2.0**top)[scales.long()]


@functools.cache
def _eighths(device: torch.device) -> torch.Tensor:
    """Return the step of each byte for a `top` of 0; a power of two more or less changes no digit."""
    return torch.exp2((torch.arange(256, dtype=torch.float64) - 255) / 8).float().to(device)


def top_of(parameters: Mapping[str, Parameter]) -> int:
    """Return the parameter `top`. Raises WireError if it is out of range."""
    top = parameters.get("top")
    if not isinstance(top, int) or isinstance(top, bool) or not LOWEST_TOP <= top <= HIGHEST_TOP:
        raise WireError(f"the scale is 2^{top!r}; the exponent must be {LOWEST_TOP} to {HIGHEST_TOP}")
    return top


LOWEST_TOP, HIGHEST_TOP = -90, 120


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes (n,) of a few bits into bytes: the first n / share of them in the low bits, and so on."""
    share = 8 // bits
    length = -(-len(codes) // share)
    if length * share != len(codes):
        codes = torch.nn.functional.pad(codes, (0, length * share - len(codes)))
    packed = codes[:length].clone()
    for place in range(1, share):
        packed |= codes[place * length : (place + 1) * length] << (bits * place)
    return packed


def unpack_bits(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the first `count` codes of `pack_bits`. Raises WireError if there are fewer."""
    share, mask = 8 // bits, 2**bits - 1
    if count > len(packed) * share:
        raise WireError(f"{len(packed)} bytes hold {len(packed) * share} codes; expected {count}")
    return torch.cat([(packed >> (bits * place)) & mask for place in range(share)])[:count]


def _chunks(groups: torch.Tensor) -> list[slice]:
    """Return ranges of groups to quantize at a time; on other devices than a CPU all at once."""
    step = CHUNK if groups.device.type == "cpu" else max(1, len(groups))
    return [slice(start, start + step) for start in range(0, len(groups), step)]


def _outlier_layout(rows: int, width: int, single_row: bool = True) -> dict[str, StoredPart]:
    """Return the parts of mean and outlier channels, which the wire calls `channels` and `apart`.

    They are empty for a single row, which would be its own mean, unless `single_row` is true.
    """
    width, outliers = (width, min(OUTLIER_CHANNELS, width // 32)) if single_row or rows != 1 else (0, 0)
    return {
        "mean": StoredPart(torch.bfloat16, (width,)),
        "channels": StoredPart(torch.int32, (outliers,)),
        "apart": StoredPart(torch.bfloat16, (rows, outliers)),
    }


def _without_outliers(
    rows: torch.Tensor, single_row: bool = True
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return rows without their mean and outlier channels, and the parts that hold these."""
    layout = _outlier_layout(len(rows), rows.shape[1], single_row)
    if not layout["mean"].shape[0]:
        return rows, {name: rows.new_empty(part.shape, dtype=part.dtype) for name, part in layout.items()}
    mean = _mean(rows).to(torch.bfloat16)
    rest = rows - mean.float()
    energy = rest.square().sum(0)
    channels = torch.topk(energy, layout["channels"].shape[0]).indices.sort().values
    values = rest[:, channels].to(torch.bfloat16)
    rest[:, channels] = 0
    return rest, {"mean": mean, "channels": channels.to(torch.int32), "apart": values}


def _mean(rows: torch.Tensor) -> torch.Tensor:
    """Return (D,), without attention sinks: one is longer than a hundred other rows."""
    if not len(rows):
        return rows.new_zeros(rows.shape[1])
    ordinary = (~attention_sinks(rows)).float()
    mean: torch.Tensor = ordinary @ rows / ordinary.sum()
    return mean


def _with_outliers(rest: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Invert `_without_outliers`. Raises WireError for channels out of range."""
    channels, width = parts["channels"].long(), rest.shape[1]
    if len(channels) and bool(((channels < 0) | (channels >= width)).any()):
        raise WireError(f"outlier channels {channels.tolist()} are out of range for rows of width {width}")
    if not len(parts["mean"]):
        return rest
    rest[:, channels] = parts["apart"].float()
    return rest + parts["mean"].float()


def _row_bound(encoded: Encoded, share: float) -> torch.Tensor:
    """Return (N,) the length of a row's error if each number is off by this share of its step."""
    parts = encoded.parts
    count, size = groups_of(sizes(encoded.shape)[1])
    steps = steps_of(parts["scales"], top_of(encoded.parameters)).double() * share
    rounding = steps.reshape(-1, count).square().sum(1).mul(size).sqrt() if len(steps) else steps
    channels = parts["apart"].double().norm(dim=1) * torch.finfo(torch.bfloat16).eps
    bound: torch.Tensor = rounding * (1 + 2e-3) + channels + 1e-5 * parts["mean"].double().norm()
    return bound
