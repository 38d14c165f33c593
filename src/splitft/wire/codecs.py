"""How the numbers of a tensor are written on the wire.

    tensor --encode--> tensor of the wire's type --(frame)--> --decode--> tensor of the model's type

A codec states the largest relative error that a number can suffer: rounding to p bits of mantissa is off
by at most 2^-(p+1) of the number, as long as it is in the type's normal range.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from splitft.errors import WireError
from splitft.wire.parts import Parameter, Part


@dataclass(frozen=True)
class Cast:
    """Round to a floating-point type."""

    dtype: torch.dtype
    """Type on the wire."""

    @property
    def bytes_per_element(self) -> float:
        """Payload of one number."""
        return float(self.dtype.itemsize)

    @property
    def relative_error(self) -> float:
        """Bound on |decoded - x| / |x| for x in the normal range of the wire's type."""
        return torch.finfo(self.dtype).eps / 2

    def encode(self, tensor: torch.Tensor) -> torch.Tensor:
        """Any shape, as it will travel."""
        return tensor.detach().to(self.dtype)

    def layout(self, shape: Sequence[int], parameters: Mapping[str, Parameter]) -> dict[str, Part]:
        """Parts that a tensor of this shape has on the wire. Raises WireError for parameters it has not."""
        if parameters:
            raise WireError(f"a cast to {self.dtype} has no parameter {next(iter(parameters))!r}")
        return {"": Part(self.dtype, tuple(shape))}

    def decode(self, encoded: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Back to the type that the receiver computes in."""
        return encoded.to(dtype)


CODECS: dict[str, Cast] = {
    "bf16": Cast(torch.bfloat16),
    "fp32": Cast(torch.float32),
    "fp64": Cast(torch.float64),
}
"""Every codec, by its name in the section `wire`."""
