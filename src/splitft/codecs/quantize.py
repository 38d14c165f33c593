"""Codecs of small integers: numbers in groups of up to 64 share a scale.

    int8   rows less their mean, outlier channels apart;
           code = round(x / s), s = max|x| / 127                         1 byte, 1/64, and the channels
    int4   the same, and what is left is rotated;
           code = round(x / s + 7.5), s = max|x| / 7.5                   half a byte, 1/64, and the channels
    int2   the same with 4 levels, s = max(max|x| / 2.5, rms)            a quarter of a byte and 1/64

A few channels and a mean row carry most of a hidden state's energy, and so most of the error if all share a
scale: they travel apart, in bfloat16, and what is left is rotated (`rows`). Gradients are rounded at random,
up as often as is right on average, by a seeded generator, so that errors cancel over steps; int2 rounds to
the nearest and relies on feedback instead (`feedback`). Scales are powers of 2^(1/8), rounded up, in one
byte, relative to the largest of the message.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from splitft.codecs.encoded import Encoded, Parameter, StoredPart
from splitft.codecs.passage import CodecContext
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
"""Groups quantised at a time: their numbers stay in the cache."""
APART = 4
"""Outlier channels of a row of 128 numbers or more."""
_TINY = 1e-30


@dataclass(frozen=True)
class Int8:
    """One byte a number; of a lone row, as adapters travel, nothing is taken apart."""

    name: str = "int8"

    def bytes_for(self, shape: tuple[int, ...]) -> float:
        """Payload of a tensor of this shape."""
        return float(sum(part.nbytes for part in self.layout(shape, {"top": 0}).values()))

    def layout(self, shape: tuple[int, ...], parameters: Mapping[str, Parameter]) -> dict[str, StoredPart]:
        """Codes (N, D), one byte of scale a group, mean (D,), outlier channels and which they are."""
        top_of(parameters)
        rows, width = sizes(shape)
        return {
            "codes": StoredPart(torch.int8, (rows, width)),
            "scales": StoredPart(torch.uint8, (rows * groups_of(width)[0],)),
            **_layout_apart(rows, width, lone=True),
        }

    def encode(self, tensor: torch.Tensor, passage: CodecContext) -> Encoded:
        """Round to the nearest, or at random where it must be right on average."""
        rows = as_rows(tensor)
        rest, parts = _taken_apart(rows, lone=True)
        groups = grouped(rest)
        room = torch.empty(min(CHUNK, len(groups)), groups.shape[1])
        largest = torch.empty(len(groups))
        for start in range(0, len(groups), CHUNK):
            some = groups[start : start + CHUNK]
            largest[start : start + CHUNK] = torch.abs(some, out=room[: len(some)]).amax(1)
        scales, top = scale_bytes(largest / 127)
        per_step = 1 / steps_of(scales, top)[:, None]
        codes = torch.empty(groups.shape, dtype=torch.int8)
        noise = passage.uniform(groups) if passage.unbiased else None
        for start in range(0, len(groups), CHUNK):
            chunk = slice(start, start + CHUNK)
            work = torch.mul(groups[chunk], per_step[chunk], out=room[: len(groups[chunk])])
            if noise is None:
                work.round_()
            else:
                work.add_(noise[chunk]).floor_()
            codes[chunk].copy_(work.clamp_(-127, 127))
        parts |= {"codes": ungrouped(codes, rows.shape[1]).contiguous(), "scales": scales}
        return Encoded(passage.role, self.name, tensor.dtype, tuple(tensor.shape), parts, {"top": top})

    def decode(self, encoded: Encoded, dtype: torch.dtype, passage: CodecContext) -> torch.Tensor:
        """Codes times scales, and what was apart."""
        codes, scales = encoded.parts["codes"], steps_of(encoded.parts["scales"], top_of(encoded.parameters))
        width = codes.shape[1]
        count, size = groups_of(width)
        if count * size == width:
            rest = torch.mul(codes.reshape(-1, size), scales[:, None]).reshape(codes.shape)
        else:
            rest = codes * scales.reshape(-1, count).repeat_interleave(size, 1)[:, :width]
        return _put_together(rest, encoded.parts).reshape(encoded.shape).to(dtype)

    def error_bound(self, encoded: Encoded, passage: CodecContext) -> torch.Tensor:
        """(N,): half a step a number, a whole one where rounding was random."""
        return _row_bound(encoded, 1.0 if encoded.role == "gradient" else 0.5)


@dataclass(frozen=True)
class Packed:
    """A few bits a number, after the mean and the outlier channels are taken out and the rest is rotated."""

    name: str
    bits: int
    """4 or 2."""

    @property
    def levels(self) -> int:
        """Codes there are."""
        return int(2**self.bits)

    def bytes_for(self, shape: tuple[int, ...]) -> float:
        """Payload of a tensor of this shape."""
        return float(sum(part.nbytes for part in self.layout(shape, {"top": 0}).values()))

    def layout(self, shape: tuple[int, ...], parameters: Mapping[str, Parameter]) -> dict[str, StoredPart]:
        """Packed codes, one byte of scale a group, mean (D,), outlier channels and which they are."""
        top_of(parameters)
        rows, width = sizes(shape)
        count, size = groups_of(width)
        return {
            "codes": StoredPart(torch.uint8, (-(-rows * count * size // (8 // self.bits)),)),
            "scales": StoredPart(torch.uint8, (rows * count,)),
            **_layout_apart(rows, width),
        }

    def encode(self, tensor: torch.Tensor, passage: CodecContext) -> Encoded:
        """Take out what is large, rotate the rest, round it."""
        rows = as_rows(tensor)
        rest, parts = _taken_apart(rows)
        groups = grouped(rotated(rest))
        scales, top = scale_bytes(self._steps(groups))
        steps = steps_of(scales, top)
        middle = (self.levels - 1) / 2
        codes = torch.empty(groups.shape, dtype=torch.uint8)
        noise = passage.uniform(groups) if passage.unbiased and self.bits > 2 else None
        for start in range(0, len(groups), CHUNK):
            chunk = slice(start, start + CHUNK)
            work = groups[chunk] * (1 / steps[chunk, None])
            work += middle + 0.5 if noise is None else middle + noise[chunk]
            codes[chunk] = work.clamp_(0, self.levels - 1)  # towards zero, and nothing is below it: floor
        parts |= {"codes": pack_bits(codes.reshape(-1), self.bits), "scales": scales}
        return Encoded(passage.role, self.name, tensor.dtype, tuple(tensor.shape), parts, {"top": top})

    def decode(self, encoded: Encoded, dtype: torch.dtype, passage: CodecContext) -> torch.Tensor:
        """The other way round."""
        rows, width = sizes(encoded.shape)
        count, size = groups_of(width)
        codes = unpack_bits(encoded.parts["codes"], self.bits, rows * count * size).reshape(-1, size)
        groups = (codes.float() - (self.levels - 1) / 2) * steps_of(
            encoded.parts["scales"], top_of(encoded.parameters)
        )[:, None]
        rest = rotated_back(ungrouped(groups, width))
        return _put_together(rest, encoded.parts).reshape(encoded.shape).to(dtype)

    def error_bound(self, encoded: Encoded, passage: CodecContext) -> torch.Tensor:
        """(N,): int4 half a step a number, a whole one at random; int2 a step at most."""
        return _row_bound(encoded, 0.5 if self.bits > 2 and encoded.role != "gradient" else 1.0)

    def _steps(self, groups: torch.Tensor) -> torch.Tensor:
        """Each group's step, from its largest number (and its rms where levels are few)."""
        largest = groups.abs().amax(1)
        if self.bits == 2:
            return torch.maximum(largest / 2.5, groups.square().mean(1).sqrt_())
        return largest * (2 / (self.levels - 1))


def channels_apart(width: int) -> int:
    """How many channels travel by themselves."""
    return min(APART, width // 32)


def scale_bytes(steps: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Positive steps as bytes, and the power of two that the largest byte stands for.

    Step = 2^(top + (byte - 255) / 8), rounded up; what is under 2^-31 of the largest is taken for that.
    """
    largest = float(steps.max()) if len(steps) else 0.0
    top = math.ceil(math.log2(largest)) if largest > _TINY else LOWEST_TOP
    eighths = torch.log2(steps.clamp_min(_TINY)).sub_(top).mul_(8).sub_(1e-3).ceil_()
    return (eighths + 255).clamp_(0, 255).to(torch.uint8), top


def steps_of(scales: torch.Tensor, top: int) -> torch.Tensor:
    """The steps that bytes stand for."""
    return (_EIGHTHS * 2.0**top)[scales.long()].float()


def top_of(parameters: Mapping[str, Parameter]) -> int:
    """The parameter `top`. Raises WireError if it is not a power of two that numbers have."""
    top = parameters.get("top")
    if not isinstance(top, int) or isinstance(top, bool) or not LOWEST_TOP <= top <= HIGHEST_TOP:
        raise WireError(f"the scale is 2^{top!r}; it must be a whole power of {LOWEST_TOP} to {HIGHEST_TOP}")
    return top


_EIGHTHS = torch.exp2((torch.arange(256, dtype=torch.float64) - 255) / 8)
LOWEST_TOP, HIGHEST_TOP = -90, 120


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (n,) of a few bits -> bytes: the first share of them in the low bits, and so on."""
    share = 8 // bits
    length = -(-len(codes) // share)
    if length * share != len(codes):
        codes = torch.nn.functional.pad(codes, (0, length * share - len(codes)))
    packed = codes[:length].clone()
    for place in range(1, share):
        packed |= codes[place * length : (place + 1) * length] << (bits * place)
    return packed


def unpack_bits(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of `pack_bits`: the first `count` codes."""
    share, mask = 8 // bits, 2**bits - 1
    if count > len(packed) * share:
        raise WireError(f"{len(packed)} bytes hold {len(packed) * share} codes; {count} were due")
    return torch.cat([(packed >> (bits * place)) & mask for place in range(share)])[:count]


def _layout_apart(rows: int, width: int, lone: bool = False) -> dict[str, StoredPart]:
    """What travels beside codes; with `lone`, nothing does of a row alone, which would be its own mean."""
    width, apart = (0, 0) if lone and rows == 1 else (width, channels_apart(width))
    return {
        "mean": StoredPart(torch.bfloat16, (width,)),
        "channels": StoredPart(torch.int32, (apart,)),
        "apart": StoredPart(torch.bfloat16, (rows, apart)),
    }


def _taken_apart(rows: torch.Tensor, lone: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Rows without their mean and their largest channels, and both as they travel."""
    layout = _layout_apart(len(rows), rows.shape[1], lone)
    if not layout["mean"].shape[0]:
        return rows, {name: torch.empty(part.shape, dtype=part.dtype) for name, part in layout.items()}
    mean = _mean(rows).to(torch.bfloat16)
    rest = rows - mean.float()
    energy = rest.square().sum(0)
    channels = torch.topk(energy, layout["channels"].shape[0]).indices.sort().values
    values = rest[:, channels].to(torch.bfloat16)
    rest[:, channels] = 0
    return rest, {"mean": mean, "channels": channels.to(torch.int32), "apart": values}


def _mean(rows: torch.Tensor) -> torch.Tensor:
    """(D,): of the rows of ordinary length, for one attention sink is longer than a hundred others."""
    if not len(rows):
        return rows.new_zeros(rows.shape[1])
    ordinary = (~attention_sinks(rows)).float()
    mean: torch.Tensor = ordinary @ rows / ordinary.sum()
    return mean


def _put_together(rest: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The inverse of `_taken_apart`. Raises WireError for channels that are not there."""
    channels, width = parts["channels"].long(), rest.shape[1]
    if len(channels) and not 0 <= int(channels.min()) <= int(channels.max()) < width:
        raise WireError(f"outlier channels {channels.tolist()} of rows of width {width}")
    if not len(parts["mean"]):
        return rest
    rest[:, channels] = parts["apart"].float()
    return rest + parts["mean"].float()


def _row_bound(encoded: Encoded, share: float) -> torch.Tensor:
    """(N,): the length of a row's error if every number is off by this share of its group's step."""
    parts = encoded.parts
    count, size = groups_of(sizes(encoded.shape)[1])
    steps = steps_of(parts["scales"], top_of(encoded.parameters)).double() * share
    rounding = steps.reshape(-1, count).square().sum(1).mul(size).sqrt() if len(steps) else steps
    channels = parts["apart"].double().norm(dim=1) * torch.finfo(torch.bfloat16).eps
    bound: torch.Tensor = rounding * (1 + 2e-3) + channels + 1e-5 * parts["mean"].double().norm()
    return bound
