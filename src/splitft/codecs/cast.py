"""Codecs that round each number by itself to a shorter floating-point type.

The relative error of rounding to p bits of mantissa is at most 2^-(p+1) in the normal range of the type;
below it, the error is at most half of the least subnormal number. `fp8` is E4M3 with a scale for each row, so
that every row uses the whole range (Micikevicius et al. 2022, arXiv 2209.05433).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from splitft.codecs.encoded import CodecContext, Encoded, Parameter, StoredPart
from splitft.codecs.rotation import as_rows, sizes
from splitft.errors import WireError

_E4M3 = torch.finfo(torch.float8_e4m3fn)
_SUBNORMAL = 2.0**-9
"""Smallest positive number of E4M3."""
_TYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def no_parameters(codec: str, parameters: Mapping[str, Parameter]) -> None:
    """Raise WireError if there are parameters, for a codec that has none."""
    if parameters:
        raise WireError(f"codec {codec} has no parameter {next(iter(parameters))!r}")


@dataclass(frozen=True)
class Cast:
    """Rounding to the floating-point type of its name."""

    name: str

    @property
    def dtype(self) -> torch.dtype:
        """Type on the wire."""
        return _TYPES[self.name]

    @property
    def relative_error(self) -> float:
        """Bound on |decoded - x| / |x| for x in the normal range of the wire's type."""
        return torch.finfo(self.dtype).eps / 2

    def bytes_for(self, shape: tuple[int, ...]) -> float:
        """Return the payload of a tensor of this shape."""
        rows, width = sizes(shape)
        return float(rows * width * self.dtype.itemsize)

    def layout(self, shape: tuple[int, ...], parameters: Mapping[str, Parameter]) -> dict[str, StoredPart]:
        """Return the one stored tensor."""
        no_parameters(self.name, parameters)
        return {"": StoredPart(self.dtype, shape)}

    def encode(self, tensor: torch.Tensor, context: CodecContext) -> Encoded:
        """Round every number."""
        stored = tensor.detach().to(self.dtype)
        return Encoded(context.role, self.name, tensor.dtype, tuple(tensor.shape), {"": stored})

    def decode(self, encoded: Encoded, dtype: torch.dtype, context: CodecContext) -> torch.Tensor:
        """Convert to the type that the receiver computes in."""
        return encoded.parts[""].to(dtype)

    def error_bound(self, encoded: Encoded, context: CodecContext) -> torch.Tensor:
        """Return (N,) bounds: the relative error of each number, at least the smallest normal number."""
        relative, least = self.relative_error, torch.finfo(self.dtype).tiny
        rows = encoded.parts[""].reshape(-1, sizes(encoded.shape)[1]).double()
        bound: torch.Tensor = (rows.abs() * (relative / (1 - relative)) + least).norm(dim=1)
        return bound


@dataclass(frozen=True)
class ScaledCast:
    """Rounding to E4M3, each row scaled to its range."""

    name: str = "fp8"

    def bytes_for(self, shape: tuple[int, ...]) -> float:
        """Return the payload: a byte for each number and four for each row."""
        rows, width = sizes(shape)
        return float(rows * (width + 4))

    def layout(self, shape: tuple[int, ...], parameters: Mapping[str, Parameter]) -> dict[str, StoredPart]:
        """Return codes (N, D) and scales (N,)."""
        no_parameters(self.name, parameters)
        rows, width = sizes(shape)
        return {
            "codes": StoredPart(torch.float8_e4m3fn, (rows, width)),
            "scales": StoredPart(torch.float32, (rows,)),
        }

    def encode(self, tensor: torch.Tensor, context: CodecContext) -> Encoded:
        """Scale each row so that its largest number is the largest of the type, and round."""
        rows = as_rows(tensor)
        largest = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))
        scales = (largest / _E4M3.max).clamp_min(torch.finfo(torch.float32).tiny)
        codes = (rows / scales[:, None]).clamp(-_E4M3.max, _E4M3.max).to(torch.float8_e4m3fn)
        parts = {"codes": codes, "scales": scales}
        return Encoded(context.role, self.name, tensor.dtype, tuple(tensor.shape), parts)

    def decode(self, encoded: Encoded, dtype: torch.dtype, context: CodecContext) -> torch.Tensor:
        """Multiply codes by scales."""
        rows = encoded.parts["codes"].float() * encoded.parts["scales"][:, None]
        return rows.reshape(encoded.shape).to(dtype)

    def error_bound(self, encoded: Encoded, context: CodecContext) -> torch.Tensor:
        """Return (N,) bounds: half a unit in the last place, at least half the smallest number."""
        codes, relative = encoded.parts["codes"].double(), _E4M3.eps / 2
        largest = (codes.abs() * (relative / (1 - relative))).clamp_min(_SUBNORMAL / 2)
        bound: torch.Tensor = largest.norm(dim=1) * encoded.parts["scales"].double() * (1 + 1e-5)
        return bound
