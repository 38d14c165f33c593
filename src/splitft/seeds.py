"""First words of seeds, one for each purpose of random numbers.

    np.random.default_rng([Draw.SHARE, seed])      Draw.SHARE.generator(seed) in short

Two purposes with the same run seed must not share random numbers, so each seed sequence begins with the
number of its purpose. Numbers are never reused or changed: a run can be repeated from its configuration.
"""

from __future__ import annotations

from enum import IntEnum, unique

import numpy as np


@unique
class Draw(IntEnum):
    """Purposes of random numbers."""

    HELD_OUT = 1
    """The examples of a client that are held out; then seed, client."""
    BATCH = 2
    """The order of an epoch; then seed, client, epoch."""
    SHARE = 3
    """The division of the text among clients; then seed."""
    SAMPLE = 4
    """The examples taken of a corpus; then seed."""
    PARTICIPANT = 5
    """The clients that take part in a round; then seed, round."""
    TURN = 6
    """The order in which clients train the server's shared factors; then seed, round, step."""
    CHANCE = 7
    """Random divisions that a division is compared with; then their number."""

    def generator(self, *words: int) -> np.random.Generator:
        """Return the generator of this purpose for these further words of the seed."""
        return np.random.default_rng([self, *words])
