"""Error feedback: what rounding removed from one message is added to the next.

    x' = x + r / N  (to each of N rows)      send C(x')      r = sum over rows of x' - C(x')

The batches of a stream hold different texts, so an error cannot be returned to its own row. What can be kept
right is the sum over rows: it is the gradient of a bias below, and, for hidden states that share a large
mean, most of the gradient of a low-rank factor. If C keeps a share of each row's energy, r stays bounded
(Karimireddy et al. 2019, Error feedback fixes SignSGD, arXiv 1901.09847). Only the sender remembers r.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from splitft.codecs.codec import Codec
from splitft.codecs.encoded import CodecContext, Encoded, Parameter, StoredPart
from splitft.codecs.rotation import as_rows

_RESIDUAL = "owed"
"""Name of r in the memory; checkpoints have it."""


@dataclass(frozen=True)
class ErrorFeedback:
    """A codec whose errors are corrected in later messages; without a memory, the inner codec."""

    inner: Codec

    @property
    def name(self) -> str:
        """Name of the inner codec."""
        return self.inner.name

    def bytes_for(self, shape: tuple[int, ...]) -> float:
        """Return what the inner codec takes."""
        return self.inner.bytes_for(shape)

    def layout(self, shape: tuple[int, ...], parameters: Mapping[str, Parameter]) -> dict[str, StoredPart]:
        """Return the parts of the inner codec."""
        return self.inner.layout(shape, parameters)

    def encode(self, tensor: torch.Tensor, context: CodecContext) -> Encoded:
        """Add the residual, encode, and keep the new residual."""
        memory = context.memory
        if memory is None or not tensor.numel():
            return self.inner.encode(tensor, context)
        rows = as_rows(tensor)
        residual = memory.get(_RESIDUAL)
        if residual is not None and len(residual) == rows.shape[1]:
            rows = rows + residual / len(rows)
        encoded = self.inner.encode(rows, context)
        memory[_RESIDUAL] = (rows - self.inner.decode(encoded, torch.float32, context)).sum(0)
        return Encoded(
            context.role, self.name, tensor.dtype, tuple(tensor.shape), encoded.parts, encoded.parameters
        )

    def decode(self, encoded: Encoded, dtype: torch.dtype, context: CodecContext) -> torch.Tensor:
        """Decode with the inner codec."""
        return self.inner.decode(encoded, dtype, context)

    def error_bound(self, encoded: Encoded, context: CodecContext) -> torch.Tensor:
        """Return the bounds of the inner codec, for rows with the residual added."""
        return self.inner.error_bound(encoded, context)
