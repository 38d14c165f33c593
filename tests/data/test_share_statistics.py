"""The summary of shares against direct counts and distances worked out by hand."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitft.data.partitions import divide
from splitft.data.share_statistics import mean_distance, summarise_shares
from splitft.data.text import Example
from splitft.specs import SharesSpec


def _examples(lengths) -> list[Example]:
    return [Example(tuple(range(length))) for length in lengths]


def _distance(p: list[int], q: list[int]) -> float:
    """Jensen-Shannon distance as a sum of Kullback-Leibler divergences to the middle, term by term."""
    total = 0.0
    for own, other in ((p, q), (q, p)):
        for a, b in zip(own, other, strict=True):
            x, y = a / sum(own), b / sum(other)
            total += 0.5 * x * math.log2(x / ((x + y) / 2)) if x else 0.0
    return math.sqrt(max(total, 0.0))


def test_distances_known_by_hand():
    assert mean_distance(np.array([[3, 0], [0, 7]])) == pytest.approx(1)
    assert mean_distance(np.array([[1, 2, 3], [10, 20, 30]])) == pytest.approx(0, abs=1e-7)
    # p = (1, 0), q = (1/2, 1/2): H(3/4, 1/4) - 1/2 = 2 - 3/4 log2 3 - 1/2
    assert mean_distance(np.array([[4, 0], [1, 1]])) == pytest.approx(math.sqrt(1.5 - 0.75 * math.log2(3)))
    assert mean_distance(np.array([[3, 1]])) == 0.0


ROW = st.lists(st.integers(0, 50), min_size=5, max_size=5).filter(any)


@given(st.lists(ROW, min_size=2, max_size=6))
def test_the_mean_distance_is_the_mean_over_all_pairs(rows):
    pairs = [_distance(p, q) for p, q in combinations(rows, 2)]
    assert mean_distance(np.array(rows)) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


@given(st.lists(st.integers(2, 200), min_size=6, max_size=60), st.integers(1, 3), st.integers(1, 10))
def test_the_counts_are_those_of_a_direct_loop(lengths, clients, bins):
    examples = _examples(lengths)
    shares = divide(examples, clients, SharesSpec())
    summary = summarise_shares(examples, shares, bins)
    assert summary.examples == tuple(len(share) for share in shares)
    assert summary.tokens == tuple(sum(lengths[i] for i in share) for share in shares)
    assert len(summary.bins) <= bins
    assert [end for pair in summary.bins for end in pair] == sorted(
        end for pair in summary.bins for end in pair
    )
    for share, histogram in zip(shares, summary.histograms, strict=True):
        counted = [sum(low <= lengths[i] <= high for i in share) for low, high in summary.bins]
        assert list(histogram) == counted
        assert sum(histogram) == len(share)
    assert 0 <= summary.length_distance <= 1


def test_the_distance_orders_the_partitions():
    examples = _examples(np.random.default_rng(0).integers(2, 300, 3000).tolist())
    distances = [
        summarise_shares(examples, divide(examples, 4, spec)).length_distance
        for spec in (
            SharesSpec(by="iid"),
            SharesSpec(alpha=10),
            SharesSpec(alpha=0.5),
            SharesSpec(alpha=0.05),
        )
    ]
    assert distances == sorted(distances)
    assert distances[0] < 0.1 < 0.5 < distances[-1]


def test_quartiles_are_lengths_that_examples_have():
    examples = _examples([2, 3, 5, 8, 13, 40])
    summary = summarise_shares(examples, ((0, 1, 2, 3, 4), (5,)))
    assert summary.quartiles == ((2, 3, 5, 8, 13), (40, 40, 40, 40, 40))


def test_labels_are_counted_and_their_distance_is_that_of_the_counts():
    labels = ["a", "b", "a", "c", "c", "c"]
    examples = [Example((1, 2, 3), label=label) for label in labels]
    summary = summarise_shares(examples, ((0, 1, 2), (3, 4, 5)))
    assert summary.labels == ("a", "b", "c")
    assert summary.label_counts == ((2, 1, 0), (0, 0, 3))
    assert summary.label_distance == pytest.approx(1)
    unlabelled = summarise_shares(_examples([2, 3, 4, 5]), ((0, 1), (2, 3)))
    assert (unlabelled.labels, unlabelled.label_distance) == ((), None)


def test_shares_drawn_at_random_are_as_far_apart_as_chance_has_it():
    examples = _examples(np.random.default_rng(1).integers(2, 300, 400).tolist())
    drawn = [
        summarise_shares(examples, divide(examples, 20, SharesSpec(by="iid"), seed)) for seed in range(5)
    ]
    mean = sum(one.length_distance for one in drawn) / len(drawn)
    assert drawn[0].chance_distance == pytest.approx(mean, abs=0.02)
    assert mean == pytest.approx(0.35, abs=0.05), "twenty examples a client, as the module's text says"
