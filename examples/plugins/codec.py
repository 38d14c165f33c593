"""A codec: float16, which has three more bits for the digits than bfloat16, and a smaller range.

wire: {hidden: fp16}
"""

from dataclasses import dataclass

import torch

from splitft.codecs import Encoded, StoredPart
from splitft.codecs.rotation import as_rows
from splitft.specs.codecs import CODECS, CodecKind

LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Half:
    """Every number in 16 bits: one for the sign, 5 for the exponent, 10 for the digits."""

    name: str = "fp16"

    def bytes_for(self, shape):
        """Return the bytes of a tensor of this shape."""
        return 2.0 * torch.Size(shape).numel()

    def layout(self, shape, parameters):
        """Return what is stored: one tensor of the same shape."""
        return {"": StoredPart(torch.float16, shape)}

    def encode(self, tensor, context):
        """Round to nearest; numbers beyond the range become the largest there is."""
        stored = tensor.float().clamp(-LARGEST, LARGEST).to(torch.float16)
        return Encoded(context.role, self.name, tensor.dtype, tuple(tensor.shape), {"": stored})

    def decode(self, encoded, dtype, context):
        """Return the numbers in the receiver's type."""
        return encoded.parts[""].to(dtype)

    def error_bound(self, encoded, context):
        """Bound each row's error: half a unit in the last of 11 digits, and the smallest step near 0."""
        rows = as_rows(encoded.parts[""].double())
        return rows.norm(dim=1) * 2.0**-10 + 2.0**-24 * rows.shape[1] ** 0.5


CODECS.add("fp16", CodecKind(Half))
