"""Fingerprints of text, to check that two runs had the same text without keeping it.

    examples --fingerprint--> 32 hexadecimal digits     the fingerprint of a union is the sum of its parts'

Each example's tokens and first labelled token are hashed (BLAKE2b, 128 bits) and the hashes added, so that
neither the order of the examples nor their division among clients matters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from splitft.data.text import Batch, Example

_BYTES = 16
_MODULUS = 1 << (8 * _BYTES)


def fingerprint(examples: Iterable[Example]) -> str:
    """Return the fingerprint of these examples; a repeated example counts each time."""
    return _text(sum(_hash(example.tokens, example.labelled_from) for example in examples))


def fingerprint_of_batches(batches: Iterable[Batch]) -> str:
    """Return the fingerprint of the examples in these batches, which does not depend on the batching."""
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
