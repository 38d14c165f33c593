"""Every way in which the numbers of a tensor may be written on the wire, by name.

    tensor --encode--> Encoded (parts, parameters) --(frame)--> --decode--> tensor of the receiver's type

A codec is told the role and what its end of the stream remembers (`CodecContext`), is deterministic, says
what it takes (`bytes_for`), what a receiver may hold a sender to (`layout`), and how far off a row may be
(`error_bound`). What travels is rounded, what is differentiated is not: the receiver's gradient with
respect to the decoded tensor is taken for the sender's with respect to its own (straight through).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from splitft.codecs.cast import Cast, ScaledCast
from splitft.codecs.encoded import Encoded, Parameter, StoredPart
from splitft.codecs.error_bounded import Bounded
from splitft.codecs.error_feedback import Feedback
from splitft.codecs.passage import CodecContext
from splitft.codecs.quantize import Int8, Packed
from splitft.codecs.temporal import Temporal
from splitft.codecs.top_k import TopK
from splitft.codecs.transform import Principal
from splitft.specs import CodecChoice


class Codec(Protocol):
    """Writes tensors and reads them back."""

    @property
    def name(self) -> str:
        """As the header of a frame has it."""

    def bytes_for(self, shape: tuple[int, ...]) -> float:
        """Payload of a tensor of this shape: exact, or expected where it follows the data."""

    def layout(self, shape: tuple[int, ...], parameters: Mapping[str, Parameter]) -> dict[str, StoredPart]:
        """The parts of such a tensor. Raises WireError for parameters that are not its own."""

    def encode(self, tensor: torch.Tensor, passage: CodecContext) -> Encoded:
        """As it will travel."""

    def decode(self, encoded: Encoded, dtype: torch.dtype, passage: CodecContext) -> torch.Tensor:
        """Back to the type that the receiver computes in. Raises WireError for contents that lie."""

    def error_bound(self, encoded: Encoded, passage: CodecContext) -> torch.Tensor:
        """(N,) Euclidean length that the error of each row may have."""


CODECS: dict[str, Codec] = {
    "fp64": Cast("fp64", torch.float64),
    "fp32": Cast("fp32", torch.float32),
    "bf16": Cast("bf16", torch.bfloat16),
    "fp8": ScaledCast(),
    "int8": Int8(),
    "int4": Packed("int4", 4),
    "int2": Feedback(Packed("int2", 2)),
    "topk": Feedback(TopK()),
    "bounded": Bounded(),
    "temporal": Temporal(),
    "principal": Principal(),
}
"""Every codec, by its name in the section `wire`, from the most bytes to the least for hidden states."""


def codec_of(given: str | CodecChoice) -> Codec:
    """The codec that a user wrote: `int4`, `bounded:rel=1e-2`, or the same as a mapping."""
    choice = CodecChoice.parse(given) if isinstance(given, str) else given
    codec: Any = CODECS[choice.codec]
    options = choice.options
    if choice.codec == "bounded" and options:
        (kind, bound), *_ = options.items()
        return Bounded("abs" if kind == "abs" else "rel", bound)
    if choice.codec == "topk" and options:
        return Feedback(TopK(share=int(options["share"])))
    return dataclasses.replace(codec, **options) if options else codec  # type: ignore[no-any-return]
