"""What a codec is told about a tensor that travels, beside its numbers.

    CodecContext(role, seed, memory, examples)   the same on both sides of the wire, except for the memory,
                                            of which each side keeps its own copy

Some codecs learn from what has travelled before (feedback, differences to the last epoch, principal axes).
What they learn lies in a memory that belongs to one stream: one client, one kind of message, one purpose.
Both ends update theirs from what both ends know, namely the decoded numbers, so that the copies agree; a
checkpoint keeps them, and a round that is played again plays the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

Memory = dict[str, torch.Tensor]
"""Tensors by name; empty at the start of a run."""


@dataclass(frozen=True)
class CodecContext:
    """One tensor's way over the wire."""

    role: str = "hidden"
    """What it is: a hidden state, its gradient, or an adapter's factor."""
    seed: int = 0
    """Fixes the rounding of gradients, which is random: drawn anew for every message."""
    memory: Memory | None = field(default=None, compare=False)
    """What this end of the stream remembers; None where nothing may be kept."""
    examples: Sequence[tuple[int, int]] = ()
    """(example, rows) of each sequence in the tensor, where the codec compares epochs."""

    @property
    def unbiased(self) -> bool:
        """Whether rounding must be right on average: errors of gradients add up over steps."""
        return self.role == "gradient"

    def uniform(self, like: torch.Tensor) -> torch.Tensor:
        """Numbers in [0, 1), the same for the same seed."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(like.shape, generator=generator, dtype=torch.float32)
