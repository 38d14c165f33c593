"""Hold text out of training, to evaluate on.

    a client's examples --held_out--> training part
                            └-------> held-out part --evaluation_part--> all, or one half

Two halves are for comparisons that choose something: on one half they choose, on the other they measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from splitft.data.text import Example
from splitft.errors import DataError
from splitft.seeds import Draw


def held_out(
    examples: Sequence[Example], share: float, seed: int, client: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Split a client's examples into a training part and a held-out part, at least one in each.

    The training part keeps the order of the examples; the held-out part is in the order of the draw, so
    that its first few are a random sample of it. Raises DataError on fewer than two examples.
    """
    if len(examples) < 2:
        raise DataError(
            f"client {client} has {len(examples)} example(s), but needs 2: one to train on, one held out; "
            f"give more text or fewer clients"
        )
    count = min(max(1, round(share * len(examples))), len(examples) - 1)
    generator = Draw.HELD_OUT.generator(seed, client)
    drawn = generator.choice(len(examples), count, replace=False).tolist()
    kept_out = set(drawn)
    training = tuple(example for i, example in enumerate(examples) if i not in kept_out)
    return training, tuple(examples[i] for i in drawn)


def evaluation_part(
    held: Sequence[Example], part: Literal["all", "first-half", "second-half"], most: int | None
) -> Sequence[Example]:
    """Return the first `most` examples of all held-out ones or of one half; the first half is never smaller.

    Raises DataError if there are none.
    """
    middle = -(-len(held) // 2)
    chosen = {"all": held, "first-half": held[:middle], "second-half": held[middle:]}[part]
    if not chosen:
        raise DataError(
            f"the {part.replace('-', ' ')} of {len(held)} held-out example(s) is empty; raise data.holdout, "
            "give more text, or fewer clients"
        )
    return chosen[:most]
