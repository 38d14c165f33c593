"""The k largest numbers of each row, for gradients, with error feedback.

    row (D,) -> k = D / 16 values in bfloat16 and their indices       2 bits a number in all

Without error feedback the numbers that are left out would be lost: Stich et al. 2018, Sparsified SGD with
memory, arXiv 1809.07599.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from splitft.codecs.cast import no_parameters
from splitft.codecs.encoded import CodecContext, Encoded, Parameter, StoredPart
from splitft.codecs.error_feedback import ErrorFeedback
from splitft.codecs.rotation import as_rows, sizes
from splitft.errors import WireError


@dataclass(frozen=True)
class TopK:
    """The numbers of largest magnitude in each row."""

    name: str = "topk"
    share: int = 16
    """One number in this many is kept, at least one in each row."""

    def kept(self, width: int) -> int:
        """Return k."""
        return min(width, max(1, width // self.share))

    def bytes_for(self, shape: tuple[int, ...]) -> float:
        """Return the payload of a tensor of this shape."""
        return float(sum(part.nbytes for part in self.layout(shape, {}).values()))

    def layout(self, shape: tuple[int, ...], parameters: Mapping[str, Parameter]) -> dict[str, StoredPart]:
        """Return values (N, k) and their indices, which the wire calls places."""
        no_parameters(self.name, parameters)
        rows, width = sizes(shape)
        kept = (rows, self.kept(width))
        return {"values": StoredPart(torch.bfloat16, kept), "places": StoredPart(_index_type(width), kept)}

    def encode(self, tensor: torch.Tensor, context: CodecContext) -> Encoded:
        """Keep the k numbers of largest magnitude, in the order of the row."""
        rows = as_rows(tensor)
        width = rows.shape[1]
        indices = torch.topk(rows.abs(), self.kept(width), dim=1, sorted=False).indices.sort(1).values
        values = rows.gather(1, indices).to(torch.bfloat16)
        parts = {"values": values, "places": indices.to(_index_type(width))}
        return Encoded(context.role, self.name, tensor.dtype, tuple(tensor.shape), parts)

    def decode(self, encoded: Encoded, dtype: torch.dtype, context: CodecContext) -> torch.Tensor:
        """Put the kept numbers back. Raises WireError for an index out of range or repeated."""
        width = sizes(encoded.shape)[1]
        indices = encoded.parts["places"].long()
        rising = bool((indices[:, 1:] > indices[:, :-1]).all())
        if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < width and rising):
            raise WireError(f"topk: the indices of a row must rise within 0 to {width - 1}")
        rows = torch.zeros(sizes(encoded.shape)).scatter_(1, indices, encoded.parts["values"].float())
        return rows.reshape(encoded.shape).to(dtype)

    def error_bound(self, encoded: Encoded, context: CodecContext) -> torch.Tensor:
        """Return (N,) bounds: no number left out is larger than the smallest that was kept."""
        values = encoded.parts["values"].double()
        width, margin = sizes(encoded.shape)[1], 1 + 2 * torch.finfo(torch.bfloat16).eps
        smallest = values.abs().amin(1) * margin if values.numel() else values.new_zeros(len(values))
        left_out = smallest.square() * (width - values.shape[1])
        rounding = values.norm(dim=1) * torch.finfo(torch.bfloat16).eps
        bound: torch.Tensor = left_out.sqrt() + rounding + 1e-30
        return bound


def top_k(share: float = 16) -> ErrorFeedback:
    """Return the codec `topk`, which keeps one number in `share`."""
    return ErrorFeedback(TopK(share=int(share)))


def _index_type(width: int) -> torch.dtype:
    return torch.int16 if width <= 2**15 else torch.int32
