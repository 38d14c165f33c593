"""One tensor on its way: what a codec stores for it, and what a codec knows beside the numbers.

    tensor --codec--> Encoded(parts: codes, scales, ...; parameters) --frame--> Encoded --codec--> tensor
                      TensorEntry(role, codec, shape, type; StoredPart of each part) is read first

A `TensorEntry` is known before any payload is read. A codec's `layout` says which parts the entry must have,
of which type and how large; a frame that announces anything else is refused.

Some codecs learn from earlier messages (error feedback, differences to the last epoch, principal axes).
What they learn lies in a memory that belongs to one stream: one client, one kind of message, one purpose.
Sender and receiver update their copies from the decoded numbers, which both know, so that the copies agree.
A checkpoint keeps them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from splitft.errors import WireError

Parameter = int | float | str | bool
"""A value that a codec may store in the header beside its parts."""
Memory = dict[str, torch.Tensor]
"""What one end of a stream remembers: tensors by name, empty at the start of a run."""

DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""Types that may be stored, by their names in safetensors."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""Names in safetensors by type."""

MAX_DIMENSIONS = 8
MAX_LENGTH = 2**40
"""Longest dimension of a tensor."""
MAX_PARTS = 10
"""Most stored tensors of one logical tensor."""
MAX_PARAMETERS = 8
MAX_CODEC_NAME = 19
"""Most letters in the name of a codec or a role."""
MAX_NAME = 300
"""Most letters in the name of a tensor."""
PART_NAME = re.compile(r"[a-z_]{0,16}", re.ASCII)
"""Empty for a single part; otherwise `codes`, `scales` and the like."""


@dataclass(frozen=True)
class CodecContext:
    """What a codec knows of a message: equal at both ends, except that each end has its own memory."""

    role: str = "hidden"
    """Kind of tensor: hidden (state), gradient or adapter."""
    seed: int = 0
    """Fixes the random rounding of gradients; different for every message."""
    memory: Memory | None = field(default=None, compare=False)
    """Memory of this end of the stream; None if nothing may be kept."""
    examples: Sequence[tuple[int, int]] = ()
    """(example id, rows) of each sequence in the tensor, if the codec compares epochs."""

    @property
    def unbiased(self) -> bool:
        """True if rounding must be right on average: errors of gradients add up over steps."""
        return self.role == "gradient"

    def uniform(self, like: torch.Tensor) -> torch.Tensor:
        """Return float32 numbers in [0, 1) of this shape, drawn on the CPU: the same for the same seed."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(like.shape, generator=generator, dtype=torch.float32).to(like.device)


@dataclass(frozen=True)
class StoredPart:
    """Type and shape of one stored tensor, as announced or as required."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    at_most: bool = False
    """In a layout: whether the first dimension may be shorter, as for compressed bytes."""

    @property
    def nbytes(self) -> int:
        """Size of the payload in bytes."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size

    def accepts(self, other: StoredPart) -> bool:
        """Return whether an announced part meets this requirement."""
        if self.dtype != other.dtype or len(self.shape) != len(other.shape):
            return False
        if self.at_most and self.shape:
            return other.shape[0] <= self.shape[0] and other.shape[1:] == self.shape[1:]
        return other.shape == self.shape

    def __str__(self) -> str:
        most = "at most " if self.at_most else ""
        return f"{NAMES.get(self.dtype, self.dtype)} {most}{list(self.shape)}"


@dataclass(frozen=True)
class TensorEntry:
    """One logical tensor as the header of a frame announces it, without its payload."""

    role: str
    """Kind of tensor: hidden, gradient, adapter or label."""
    codec: str
    """Name of the codec that encoded it."""
    dtype: torch.dtype
    """Type that the sender computes in."""
    shape: tuple[int, ...]
    """Shape of the decoded tensor."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    """Values that the codec stores in the header."""
    parts: Mapping[str, StoredPart] = field(default_factory=dict)
    """Stored tensors by name."""

    def check(self, name: str, layout: Mapping[str, StoredPart]) -> None:
        """Raise WireError unless the announced parts are those of the layout; `name` is the tensor's."""
        if self.parts.keys() != layout.keys():
            expected, found = (", ".join(map(repr, sorted(keys))) for keys in (layout, self.parts))
            raise WireError(f"{name!r} in codec {self.codec} has the parts {found}; expected {expected}")
        for part, required in layout.items():
            if not required.accepts(self.parts[part]):
                stored = f"{name}#{part}" if part else name
                raise WireError(f"{stored!r} is {self.parts[part]}; codec {self.codec} requires {required}")


@dataclass(frozen=True)
class Encoded:
    """One logical tensor with its payload."""

    role: str
    codec: str
    dtype: torch.dtype
    """Type that the sender computes in."""
    shape: tuple[int, ...]
    parts: Mapping[str, torch.Tensor]
    """Stored tensors by name; a single one has the empty name."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size of the payload in bytes."""
        return sum(part.numel() * part.dtype.itemsize for part in self.parts.values())

    def to(self, device: torch.device) -> Encoded:
        """Return it with its parts on a device; what crosses, crosses in one copy."""
        if all(part.device == device for part in self.parts.values()):
            return self
        # a part begins at a multiple of the size of its numbers if larger ones come first
        order = sorted(self.parts, key=lambda name: -self.parts[name].dtype.itemsize)
        flat = [self.parts[name].reshape(-1).view(torch.uint8) for name in order]
        joined = (flat[0] if len(flat) == 1 else torch.cat(flat)).to(device)
        found = dict(zip(order, torch.split(joined, [len(one) for one in flat]), strict=True))
        parts = {name: found[name].view(part.dtype).view(part.shape) for name, part in self.parts.items()}
        return replace(self, parts=parts)

    @property
    def entry(self) -> TensorEntry:
        """What the header of a frame says about it."""
        parts = {name: StoredPart(part.dtype, tuple(part.shape)) for name, part in self.parts.items()}
        return TensorEntry(self.role, self.codec, self.dtype, self.shape, self.parameters, parts)
