"""Seeds begin with a number for their purpose; recorded runs depend on these numbers."""

from __future__ import annotations

import numpy as np

from splitft.seeds import Draw


def test_no_purpose_changes_its_number():
    assert {draw.name: int(draw) for draw in Draw} == {
        "HELD_OUT": 1, "BATCH": 2, "SHARE": 3, "SAMPLE": 4, "PARTICIPANT": 5, "TURN": 6, "CHANCE": 7,
    }  # fmt: skip


def test_purposes_draw_differently_from_one_seed():
    draws = [draw.generator(5, 0).integers(2**32) for draw in Draw]
    assert len(set(draws)) == len(Draw)
    assert draws[0] == np.random.default_rng([1, 5, 0]).integers(2**32)
