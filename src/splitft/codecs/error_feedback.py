"""What rounding took away from one message is added to the next.

    x' = x + r / N  (to each of N rows)      send C(x')      r = sum over rows of x' - C(x')

A stream's batches hold different texts, so an error cannot be given back to the row that it was taken from.
What can be kept right is the sum over rows: it is what a bias below would be trained with, and, with hidden
states that share a large mean, most of what a low-rank factor is trained with. If a codec keeps a share of
each row's energy, r stays bounded (Karimireddy et al. 2019, Error feedback fixes SignSGD, arXiv 1901.09847).
Only the sender remembers. Without a memory the codec is what is inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from splitft.codecs.encoded import Encoded, Parameter, StoredPart
from splitft.codecs.passage import CodecContext
from splitft.codecs.quantize import Packed
from splitft.codecs.rotation import as_rows
from splitft.codecs.top_k import TopK

_OWED = "owed"


@dataclass(frozen=True)
class Feedback:
    """A codec whose errors are made good in sum."""

    inner: Packed | TopK

    @property
    def name(self) -> str:
        """As the codec inside."""
        return self.inner.name

    def bytes_for(self, shape: tuple[int, ...]) -> float:
        """As the codec inside."""
        return self.inner.bytes_for(shape)

    def layout(self, shape: tuple[int, ...], parameters: Mapping[str, Parameter]) -> dict[str, StoredPart]:
        """As the codec inside."""
        return self.inner.layout(shape, parameters)

    def encode(self, tensor: torch.Tensor, passage: CodecContext) -> Encoded:
        """Add what is owed, send, and note what is owed now."""
        memory = passage.memory
        if memory is None or not tensor.numel():
            return self.inner.encode(tensor, passage)
        rows = as_rows(tensor)
        owed = memory.get(_OWED)
        if owed is not None and len(owed) == rows.shape[1]:
            rows = rows + owed / len(rows)
        encoded = self.inner.encode(rows, passage)
        memory[_OWED] = (rows - self.inner.decode(encoded, torch.float32, passage)).sum(0)
        return Encoded(
            passage.role, self.name, tensor.dtype, tuple(tensor.shape), encoded.parts, encoded.parameters
        )

    def decode(self, encoded: Encoded, dtype: torch.dtype, passage: CodecContext) -> torch.Tensor:
        """As the codec inside."""
        return self.inner.decode(encoded, dtype, passage)

    def error_bound(self, encoded: Encoded, passage: CodecContext) -> torch.Tensor:
        """(N,): of the codec inside, for the rows with what was owed."""
        return self.inner.error_bound(encoded, passage)
