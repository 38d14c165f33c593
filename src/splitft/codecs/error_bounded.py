"""A codec with a bound on the error of every number; the bytes depend on the data.

    bound b:  code = round(x / 2b)   so that |decoded - x| <= b
    abs=B: b = B         rel=R: b = R times the root mean square of the tensor's row

The codes of a tensor take 8, 16 or 32 bits, as few as they can. They are stored channel by channel, split
into byte planes, and compressed without loss by zstandard, whose entropy coder gives frequent codes fewer
bits. SZ does the same after a prediction (Di and Cappello 2016).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import zstandard

from splitft.codecs.encoded import CodecContext, Encoded, Parameter, StoredPart
from splitft.codecs.rotation import sizes
from splitft.errors import WireError

LEVEL = 3
"""Compression level of zstandard, its default."""
_TYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_LARGEST_CODE = 2.0**30


@dataclass(frozen=True)
class Bounded:
    """A uniform quantizer with a step that the user gives, followed by zstandard."""

    kind: Literal["abs", "rel"] = "rel"
    """Kind of the bound: an absolute number, or a share of each row's root mean square."""
    bound: float = 1e-2
    name: str = "bounded"

    def bytes_for(self, shape: tuple[int, ...]) -> float:
        """Estimate the payload from the entropy of a normally distributed row with this step."""
        rows, width = sizes(shape)
        step = 2 * self.bound if self.kind == "rel" else 0.02
        bits = max(0.1, 0.5 * math.log2(2 * math.pi * math.e) - math.log2(step)) if step < 4 else 0.1
        return rows * (width * bits / 8 + 4)

    def layout(self, shape: tuple[int, ...], parameters: Mapping[str, Parameter]) -> dict[str, StoredPart]:
        """Return compressed codes, at most as long as zstandard may need, and a step for each row."""
        rows, width = sizes(shape)
        raw = rows * width * _nbytes(parameters)
        most = raw + raw // 128 + 1024
        return {
            "codes": StoredPart(torch.uint8, (most,), at_most=True),
            "steps": StoredPart(torch.float32, (rows,)),
        }

    def encode(self, tensor: torch.Tensor, context: CodecContext) -> Encoded:
        """Round to multiples of the step, then compress. Raises WireError if the codes need over 30 bits."""
        rows = tensor.detach().reshape(sizes(tuple(tensor.shape))).double()
        steps = self._steps(rows, context)
        codes = rows / steps.double()[:, None]
        codes = (codes + context.uniform(codes)).floor() if context.unbiased else codes.round()
        largest = float(codes.abs().max()) if codes.numel() else 0.0
        if largest > _LARGEST_CODE:
            raise WireError(
                f"bounded: the bound {self.bound:g} would need codes of {largest:.0e}; give a larger one"
            )
        nbytes = next(n for n, dtype in _TYPES.items() if largest <= torch.iinfo(dtype).max)
        planes = codes.T.contiguous().to(_TYPES[nbytes]).numpy().view(np.uint8).reshape(-1, nbytes)
        packed = zstandard.ZstdCompressor(level=LEVEL).compress(np.ascontiguousarray(planes.T).tobytes())
        stored = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        parts = {"codes": stored, "steps": steps}
        return Encoded(context.role, self.name, tensor.dtype, tuple(tensor.shape), parts, {"nbytes": nbytes})

    def decode(self, encoded: Encoded, dtype: torch.dtype, context: CodecContext) -> torch.Tensor:
        """Decompress to exactly the expected length and multiply. Raises WireError for any other length."""
        rows, width = sizes(encoded.shape)
        nbytes = _nbytes(encoded.parameters)
        expected = rows * width * nbytes
        try:
            packed = encoded.parts["codes"].numpy().tobytes()
            if zstandard.frame_content_size(packed) != expected:
                raise WireError(f"bounded: the codes do not decompress to the {expected} bytes expected")
            raw = bytearray(zstandard.ZstdDecompressor().decompress(packed, max_output_size=expected))
        except zstandard.ZstdError as error:
            raise WireError(f"bounded: the codes are not zstandard: {error}") from error
        planes = np.frombuffer(raw, dtype=np.uint8).reshape(nbytes, -1)
        codes = torch.from_numpy(planes.T.reshape(-1).copy()).view(_TYPES[nbytes])
        steps = encoded.parts["steps"].double()
        numbers = codes.reshape(width, rows).T.double() * steps[:, None]
        return numbers.to(dtype).reshape(encoded.shape).contiguous()  # column-major products are slow

    def error_bound(self, encoded: Encoded, context: CodecContext) -> torch.Tensor:
        """Return (N,) bounds: half a step for each number; a whole (smaller) step if rounding is random."""
        share = 1.0 if encoded.role == "gradient" else 0.5
        width = sizes(encoded.shape)[1]
        return encoded.parts["steps"].double() * (share * (1 + 1e-6) * math.sqrt(width))

    def _steps(self, rows: torch.Tensor, context: CodecContext) -> torch.Tensor:
        """Return (N,): twice the bound; the bound itself where random rounding may be off by a whole step."""
        step = self.bound * (1.0 if context.unbiased else 2.0) * (1 - 1e-5)  # a margin for float32
        if self.kind == "rel" and rows.numel():
            return (rows.square().mean(1).sqrt() * step).clamp_min(1e-30).float()
        return torch.full((len(rows),), step, dtype=torch.float32)


def bounded(**bound: float) -> Bounded:
    """Return the codec for `abs=BOUND` or `rel=BOUND`; without either, its default."""
    return next(
        (Bounded("abs" if kind == "abs" else "rel", value) for kind, value in bound.items()), Bounded()
    )


def _nbytes(parameters: Mapping[str, Parameter]) -> int:
    nbytes = parameters.get("nbytes")
    if nbytes not in _TYPES or not isinstance(nbytes, int) or isinstance(nbytes, bool):
        raise WireError(f"bounded: codes of {nbytes!r} bytes; they must have 1, 2 or 4")
    return nbytes
