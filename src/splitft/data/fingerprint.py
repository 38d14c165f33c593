"""Tell whether two runs had the same text, without keeping the text.

    examples --fingerprint--> 32 hexadecimal digits        united([a, b]) = fingerprint of both together

Each example's tokens and first labelled place are hashed (BLAKE2b, 128 bits) and the hashes added, so that
neither the order of the examples nor how they are divided among clients matters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from splitft.data.text import Batch, Example

_BYTES = 16
_MODULUS = 1 << (8 * _BYTES)


def fingerprint(examples: Iterable[Example]) -> str:
    """Of these examples, each as often as it is there."""
    return _text(sum(_hash(example.tokens, example.labelled_from) for example in examples))


def fingerprint_of_batches(batches: Iterable[Batch]) -> str:
    """Of the examples in these batches, however they are batched."""
    total = 0
    for batch in batches:
        rows = zip(batch.tokens.tolist(), batch.lengths, batch.labelled_from, strict=True)
        total += sum(_hash(row[:length], first) for row, length, first in rows)
    return _text(total)


def _hash(tokens: Iterable[int], labelled_from: int) -> int:
    numbers = np.array([labelled_from, *tokens], dtype="<i8")
    return int.from_bytes(hashlib.blake2b(numbers.tobytes(), digest_size=_BYTES).digest(), "little")


def _text(total: int) -> str:
    return f"{total % _MODULUS:0{2 * _BYTES}x}"
