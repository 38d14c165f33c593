"""The largest numbers of each row, and nothing of the rest: for gradients, with feedback.

    row (D,) -> k = D / 16 values in bfloat16 and their places       2 bits a number, all in

What is left out is not lost on average only if it is fed back later (`feedback`): Stich et al. 2018,
Sparsified SGD with memory, arXiv 1809.07599.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from splitft.codecs.cast import no_parameters
from splitft.codecs.encoded import Encoded, Parameter, StoredPart
from splitft.codecs.passage import CodecContext
from splitft.codecs.rotation import as_rows, sizes
from splitft.errors import WireError


@dataclass(frozen=True)
class TopK:
    """Keep the largest numbers of each row."""

    name: str = "topk"
    share: int = 16
    """One number in this many is kept, at least one a row."""

    def kept(self, width: int) -> int:
        """k."""
        return min(width, max(1, width // self.share))

    def bytes_for(self, shape: tuple[int, ...]) -> float:
        """Payload of a tensor of this shape."""
        return float(sum(part.nbytes for part in self.layout(shape, {}).values()))

    def layout(self, shape: tuple[int, ...], parameters: Mapping[str, Parameter]) -> dict[str, StoredPart]:
        """Values (N, k) and their places in the row."""
        no_parameters(self.name, parameters)
        rows, width = sizes(shape)
        kept = (rows, self.kept(width))
        places = torch.int16 if width <= 2**15 else torch.int32
        return {"values": StoredPart(torch.bfloat16, kept), "places": StoredPart(places, kept)}

    def encode(self, tensor: torch.Tensor, passage: CodecContext) -> Encoded:
        """Choose by magnitude."""
        rows = as_rows(tensor)
        width = rows.shape[1]
        places = torch.topk(rows.abs(), self.kept(width), dim=1, sorted=False).indices.sort(1).values
        values = rows.gather(1, places).to(torch.bfloat16)
        narrow = places.to(torch.int16 if width <= 2**15 else torch.int32)
        parts = {"values": values, "places": narrow}
        return Encoded(passage.role, self.name, tensor.dtype, tuple(tensor.shape), parts)

    def decode(self, encoded: Encoded, dtype: torch.dtype, passage: CodecContext) -> torch.Tensor:
        """The kept numbers in their places. Raises WireError if a place is not in the row, or comes twice."""
        width = sizes(encoded.shape)[1]
        places = encoded.parts["places"].long()
        ordered = bool((places[:, 1:] > places[:, :-1]).all())
        if places.numel() and not (int(places.min()) >= 0 and int(places.max()) < width and ordered):
            raise WireError(f"topk: places must rise within a row of {width}")
        rows = torch.zeros(sizes(encoded.shape)).scatter_(1, places, encoded.parts["values"].float())
        return rows.reshape(encoded.shape).to(dtype)

    def error_bound(self, encoded: Encoded, passage: CodecContext) -> torch.Tensor:
        """(N,): what is left out is nowhere larger than the least that was kept."""
        values = encoded.parts["values"].double()
        width, near = sizes(encoded.shape)[1], 1 + 2 * torch.finfo(torch.bfloat16).eps
        least = values.abs().amin(1) * near if values.numel() else values.new_zeros(len(values))
        left_out = least.square() * (width - values.shape[1])
        rounding = values.norm(dim=1) * torch.finfo(torch.bfloat16).eps
        bound: torch.Tensor = left_out.sqrt() + rounding + 1e-30
        return bound
