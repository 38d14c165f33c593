"""Convert padded batches (B, T, D), for computation, to packed rows (N, D), for transport, and back.

N is the number of real tokens, the sum of the lengths. Padding is on the right and is zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pack(hidden: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Pack (B, T, D) to (N, D): the first `lengths[b]` positions of each sequence, in order."""
    if all(length == hidden.shape[1] for length in lengths):
        return hidden.reshape(-1, hidden.shape[-1])
    return torch.cat([row[:length] for row, length in zip(hidden, lengths, strict=True)])


def pad(packed: torch.Tensor, lengths: Sequence[int], width: int | None = None) -> torch.Tensor:
    """Pad (N, D) to (B, T, D) with T = `width`, by default the longest length."""
    width = max(lengths) if width is None else width
    if all(length == width for length in lengths):
        return packed.reshape(len(lengths), width, packed.shape[-1])
    rows = torch.split(packed, list(lengths))
    return torch.stack([torch.nn.functional.pad(row, (0, 0, 0, width - len(row))) for row in rows])


def pick(hidden: torch.Tensor, ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Pick (M, D) of (B, T, D): positions [start, stop) of each sequence, in order."""
    return torch.cat([row[start:stop] for row, (start, stop) in zip(hidden, ranges, strict=True)])
