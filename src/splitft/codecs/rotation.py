"""A tensor as rows of groups, and the fixed rotation that spreads an outlier over its row.

    any shape (..., D) -> rows (N, D) -> groups (N * G, g),  G = ceil(D / 64), rows padded to G * g with zeros

The rotation is a Kronecker product of a Hadamard matrix, whose size is the largest power of two up to 64 that
divides D, with a random orthogonal matrix, after random signs. Both depend on D alone, so that both sides
have the same. It preserves lengths and leaves no channel larger than the others: QuaRot, arXiv 2404.00456.
"""

from __future__ import annotations

import functools
import math

import torch

GROUP = 64
"""Most numbers that share a scale."""
SINK = 3.0
"""A row longer than this many times the median length is an attention sink."""
LARGEST_MIX = 128
"""Largest random orthogonal matrix; wider rows are only rotated within slices of a power of two."""
_SEED = 20240330


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor (..., D) as rows (N, D) in float32; a scalar is one row of one number."""
    return tensor.detach().reshape(sizes(tuple(tensor.shape))).to(torch.float32).contiguous()


def sizes(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return N and D of a tensor of this shape."""
    width = shape[-1] if shape else 1
    return (math.prod(shape[:-1]) if shape else 1), width


def groups_of(width: int) -> tuple[int, int]:
    """Return G, the groups of a row, and g, the numbers of a group."""
    count = max(1, -(-width // GROUP))
    return count, -(-width // count)


def attention_sinks(rows: torch.Tensor) -> torch.Tensor:
    """Return (N,): which rows (N, D) are far longer than the others, as those of attention sinks are."""
    length = torch.linalg.vector_norm(rows, dim=1)
    return length > SINK * length.median() if len(rows) else rows.new_zeros(0, dtype=torch.bool)


def grouped(rows: torch.Tensor) -> torch.Tensor:
    """Split rows (N, D) into groups (N * G, g)."""
    count, size = groups_of(rows.shape[1])
    if count * size != rows.shape[1]:
        rows = torch.nn.functional.pad(rows, (0, count * size - rows.shape[1]))
    return rows.reshape(len(rows) * count, size)


def ungrouped(groups: torch.Tensor, width: int) -> torch.Tensor:
    """Join groups (N * G, g) to rows (N, D)."""
    count, size = groups_of(width)
    rows = groups.reshape(len(groups) // count, count * size)
    return rows if count * size == width else rows[:, :width]


def rotated(rows: torch.Tensor) -> torch.Tensor:
    """Apply the fixed rotation to each row of (N, D)."""
    signs, hadamard, mix = _rotation(rows.shape[1], rows.device)
    parts = (rows * signs).reshape(len(rows), len(signs) // len(hadamard), len(hadamard)) @ hadamard
    return (parts if mix is None else torch.matmul(mix, parts)).reshape(rows.shape)


def rotated_back(rows: torch.Tensor) -> torch.Tensor:
    """Invert `rotated`."""
    signs, hadamard, mix = _rotation(rows.shape[1], rows.device)
    parts = rows.reshape(len(rows), len(signs) // len(hadamard), len(hadamard))
    parts = parts if mix is None else torch.matmul(mix.T, parts)
    return (parts @ hadamard.T).reshape(rows.shape) * signs


@functools.cache
def _rotation(width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return signs (D,), a Hadamard matrix (2^a, 2^a) and an orthogonal matrix (m, m), D = m 2^a.

    They are drawn on the CPU. The orthogonal matrix is None if m is 1 or large.
    """
    generator = torch.Generator().manual_seed(_SEED + width)
    power = min(math.gcd(width, GROUP), width)
    hadamard = torch.ones(1, 1)
    while len(hadamard) < power:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    signs = torch.randint(2, (width,), generator=generator) * 2.0 - 1.0
    count, mix = width // power, None
    if 1 < count <= LARGEST_MIX:
        drawn = torch.randn(count, count, generator=generator, dtype=torch.float64)
        mix = torch.linalg.qr(drawn).Q.float().contiguous().to(device)
    return signs.to(device), (hadamard / math.sqrt(power)).to(device), mix
