"""What an audit found reads well on a terminal and on a page."""

from __future__ import annotations

import pytest

from splitft.tracking.leaks import rise


@pytest.mark.parametrize(
    ("cost", "words"),
    [(0.0, "+0.0%"), (-0.001, "-0.1%"), (0.355, "+35.5%"), (1.0, "x 2.0"), (5.9, "x 6.9"), (4231, "x 4,232")],
)
def test_a_rise_of_perplexity_is_told_in_per_cent_or_times(cost, words):
    assert rise(cost) == words
