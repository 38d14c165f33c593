"""Entropy coding of integers of known spread: many rANS coders, called lanes, side by side.

    codes (S, L): S lines of L lanes; all L symbols of a line have the same spread

A symbol of probability f / 2^15 takes log2(2^15 / f) bits (Duda 2013, asymmetric numeral systems, arXiv
1311.2540). Each lane has a state in [2^16, 2^32) and writes or reads a word of 16 bits when it would leave
that range. A line is one step of all lanes at once. The distribution of symbols of spread s (standard
deviation over step) is half normal, half Laplace: hidden states along their principal axes have tails between
the two.
"""

from __future__ import annotations

import functools
import math
import zlib

import numpy as np
from numpy.typing import NDArray

from splitft.errors import WireError

LARGEST = 127
"""Symbols are integers from minus to plus this."""
CLASSES = 48
"""Spreads are rounded to powers of 2^(1/4), from 2^-4 to 2^7.75. Class 48 + b is the uniform distribution
from 0 to 2^b - 1."""
MOST_BITS = 7
"""Most bits of a uniform symbol."""
TABLES_CRC32 = 0xE9F2CFF5
"""Checksum of the frequencies of spreads, class by class, as little-endian 32-bit numbers."""
_PRECISION = 15
_LOW = np.uint64(1 << 16)
_WORD = np.uint64(16)
_SHIFT = np.uint64(_PRECISION)
_MASK = np.uint64((1 << _PRECISION) - 1)

Integers = NDArray[np.int64]


def class_of(spread: NDArray[np.float64]) -> Integers:
    """Return the nearest class of each spread."""
    nearest = np.rint(np.log2(np.maximum(spread, 1e-9)) * 4) + 16
    classes: Integers = np.clip(nearest, 0, CLASSES - 1).astype(np.int64)
    return classes


def taken_bits(codes: NDArray[np.int16], classes: Integers) -> float:
    """Return the bits that codes (S, L) take with the class of each line (S,), without the lanes' states."""
    share, _, _ = _tables()
    chance = share[classes[:, None], codes.astype(np.int64) + LARGEST]
    return float(_PRECISION * codes.size - np.log2(chance).sum())


def encode(codes: NDArray[np.int16], classes: Integers) -> bytes:
    """Encode codes (S, L) with the class of each line (S,); the states of the lanes come first."""
    share, below, _ = _tables()
    symbols = codes.astype(np.int64) + LARGEST
    state = np.full(codes.shape[1], _LOW)
    words: list[NDArray[np.uint16]] = []
    for line in range(len(codes) - 1, -1, -1):
        f = share[classes[line]][symbols[line]].astype(np.uint64)
        full = state >= f << np.uint64(32 - _PRECISION)
        words.append((state[full] & np.uint64(0xFFFF)).astype("<u2"))
        state[full] >>= _WORD
        whole, rest = np.divmod(state, f)
        state = (whole << _SHIFT) + rest + below[classes[line]][symbols[line]].astype(np.uint64)
    return state.astype("<u4").tobytes() + b"".join(part.tobytes() for part in reversed(words))


def decode(data: bytes, classes: Integers, lanes: int) -> NDArray[np.int16]:
    """Invert `encode`. Raises WireError if the bytes are not exactly those of such codes."""
    share, below, lookup = _tables()
    if len(data) < 4 * lanes or (len(data) - 4 * lanes) % 2:
        raise WireError(f"{len(data)} bytes cannot be an entropy code of {lanes} lanes")
    state = np.frombuffer(data, "<u4", lanes).astype(np.uint64)
    words = np.frombuffer(data, "<u2", offset=4 * lanes).astype(np.uint64)
    codes = np.empty((len(classes), lanes), np.int16)
    read = 0
    for line, class_ in enumerate(classes):
        slot = (state & _MASK).astype(np.int64)
        symbol = lookup[class_][slot]
        codes[line] = symbol
        f = share[class_][symbol].astype(np.uint64)
        state = f * (state >> _SHIFT) + slot.astype(np.uint64) - below[class_][symbol].astype(np.uint64)
        lacking = np.flatnonzero(state < _LOW)
        if read + len(lacking) > len(words):
            raise WireError("an entropy code ends too early")
        state[lacking] = (state[lacking] << _WORD) | words[read : read + len(lacking)]
        read += len(lacking)
    if read != len(words) or bool((state != _LOW).any()):
        raise WireError("an entropy code is damaged: it does not end in its initial state")
    codes -= LARGEST
    return codes


@functools.cache
def _tables() -> tuple[Integers, Integers, NDArray[np.uint8]]:
    """Return by class the share of each symbol in 2^15 (at least 1), the sum of those below, and the inverse.

    Raises WireError if the floating-point results of this machine differ from the reference.
    """
    total, edges = 1 << _PRECISION, np.arange(-LARGEST, LARGEST + 2) - 0.5
    share = np.zeros((CLASSES + MOST_BITS + 1, 2 * LARGEST + 1), np.int64)
    for class_ in range(CLASSES):
        spread = 2.0 ** ((class_ - 16) / 4)
        normal = np.array([0.5 * math.erfc(-edge / spread / math.sqrt(2)) for edge in edges])
        scale = spread / math.sqrt(2)
        laplace = np.array(
            [0.5 * math.exp(e / scale) if e < 0 else 1 - 0.5 * math.exp(-e / scale) for e in edges]
        )
        chance = np.diff((normal + laplace) / 2)
        share[class_] = 1 + np.floor(chance / chance.sum() * (total - len(chance)))
        share[class_, LARGEST] += total - share[class_].sum()
    if (found := zlib.crc32(share[:CLASSES].astype("<u4").tobytes())) != TABLES_CRC32:
        raise WireError(
            f"entropy coding: the tables of this machine have the CRC-32 {found:08x}; use another codec"
        )
    for bits in range(MOST_BITS + 1):
        share[CLASSES + bits, LARGEST : LARGEST + 2**bits] = total >> bits
    below = np.cumsum(share, 1) - share
    lookup = np.stack([np.repeat(np.arange(2 * LARGEST + 1), row) for row in share]).astype(np.uint8)
    return share, below, lookup
