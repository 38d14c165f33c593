"""The interface of a codec, and how a user's text becomes one.

    tensor --encode--> Encoded (parts, parameters) --(frame)--> --decode--> tensor of the receiver's type

Only what travels is rounded. Backward passes use the received gradient as if nothing had been rounded
(straight-through estimator).

    tensor on cuda:0 --encode there--> parts --one copy--> CPU --(frame)--> CPU --one copy--> decode on cuda:1

A codec that computes on any device (`CodecKind.on_device`) does so wherever that makes the copy between the
device and the CPU smaller. What is encoded is always on the CPU in the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Protocol

import torch

from splitft.codecs.encoded import MAX_CODEC_NAME, CodecContext, Encoded, Parameter, StoredPart
from splitft.errors import PluginError
from splitft.registry import generation
from splitft.specs.codecs import CODECS, CodecChoice


class Codec(Protocol):
    """Writes tensors and reads them back.

    One object serves all streams, so it holds no state of its own: what it remembers lies in the memory of
    the context. It is deterministic; random rounding takes its numbers from `CodecContext.uniform`. A frozen
    dataclass whose fields are the options fits best. Every method takes any shape, also one without
    dimensions or without numbers; `rotation.as_rows` gives rows (N, D). Register it with a `CodecKind` in
    `splitft.specs.codecs.CODECS`.
    """

    @property
    def name(self) -> str:
        """Name in the header of a frame: the one in CODECS, at most 19 letters."""

    def bytes_for(self, shape: tuple[int, ...]) -> float:
        """Estimate the payload of a tensor of this shape: exact, or the mean if it depends on the data.

        The schedule plans with it, so it need not know any numbers.
        """

    def layout(self, shape: tuple[int, ...], parameters: Mapping[str, Parameter]) -> dict[str, StoredPart]:
        """Return the parts that a tensor of this shape must have; "" is the name of a single part.

        The receiver compares them with the header of a frame before it reads the payload, so that a sender
        cannot make it allocate more. Raises WireError for parameters that are not the codec's own.
        """

    def encode(self, tensor: torch.Tensor, context: CodecContext) -> Encoded:
        """Return the parts as they will travel, which fit `layout`; update the sender's memory."""

    def decode(self, encoded: Encoded, dtype: torch.dtype, context: CodecContext) -> torch.Tensor:
        """Return the tensor, contiguous, in the type that the receiver computes in; update its memory.

        The layout has been checked. Raises WireError for contents that are invalid, such as an index out of
        range; whatever the bytes are, it must end in a tensor or a WireError.
        """

    def error_bound(self, encoded: Encoded, context: CodecContext) -> torch.Tensor:
        """Return (N,) bounds on the Euclidean length of each row's error, from what was received."""


def codec_of(text: str) -> Codec:
    """Return the codec that a user wrote, such as `int4` or `bounded:rel=1e-2`; made once for each text.

    Raises ValueError for a text that names no codec, and PluginError for a plug-in codec that cannot travel.
    """
    return _codec_of(text, generation())


@cache
def _codec_of(text: str, generation: int) -> Codec:
    choice = CodecChoice.parse(text)
    codec: Codec = choice.kind.make(**choice.options)
    if codec.name != choice.codec or len(codec.name) > MAX_CODEC_NAME:
        raise PluginError(
            f"the codec {choice.codec!r} calls itself {codec.name!r}; both must be the same name of at most "
            f"{MAX_CODEC_NAME} letters"
        )
    return codec


def place_to_encode(codec: Codec, tensor: torch.Tensor, context: CodecContext) -> torch.Tensor:
    """Return a tensor where to encode it: on its device if the copy is smaller then, else on the CPU."""
    kind = CODECS[codec.name]
    drawn = kind.draws_gradients and context.unbiased
    smaller = codec.bytes_for(tuple(tensor.shape)) < tensor.nbytes
    return tensor if kind.runs_on(tensor.device.type) and smaller and not drawn else tensor.cpu()


def place_to_decode(codec: Codec, encoded: Encoded, dtype: torch.dtype, device: torch.device) -> Encoded:
    """Return what arrived where to decode it: on the device if it is a smaller copy than the numbers."""
    smaller = encoded.nbytes < math.prod(encoded.shape) * dtype.itemsize
    return encoded.to(device) if CODECS[codec.name].runs_on(device.type) and smaller else encoded
