"""Partitions: properties of every division, and of each one."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitft.data.partitions import PARTITIONS, Partition, divide, length_classes, values_of
from splitft.data.text import Example
from splitft.errors import DataError
from splitft.specs import SharesSpec


def _examples(lengths, labels="abc") -> list[Example]:
    return [Example(tuple(range(length)), 1, labels[i % len(labels)]) for i, length in enumerate(lengths)]


def _spec(by: str, alpha: float = 0.5, classes: int = 8) -> SharesSpec:
    return SharesSpec(by=by, alpha=alpha, classes=classes, column="topic")


@given(
    by=st.sampled_from(sorted(set(PARTITIONS) - {"natural"})),
    lengths=st.lists(st.integers(2, 300), min_size=2, max_size=80),
    clients=st.integers(1, 12),
    minimum=st.integers(0, 4),
    alpha=st.sampled_from([1e-300, 1e-3, 0.1, 1.0, 1e6]),
    classes=st.integers(1, 20),
    seed=st.integers(0, 9),
)
def test_every_example_goes_to_exactly_one_client_and_nobody_starves(
    by, lengths, clients, minimum, alpha, classes, seed
):
    examples, spec = _examples(lengths), _spec(by, alpha, classes)
    if clients * minimum > len(examples):
        with pytest.raises(DataError, match=f"{clients} clients need at least {minimum}"):
            divide(examples, clients, spec, seed, minimum)
        return
    shares = divide(examples, clients, spec, seed, minimum)
    assert len(shares) == clients
    assert sorted(i for share in shares for i in share) == list(range(len(examples)))
    assert all(len(share) >= minimum and list(share) == sorted(share) for share in shares)
    assert shares == divide(examples, clients, spec, seed, minimum)


@given(st.lists(st.integers(2, 300), min_size=1, max_size=80), st.integers(1, 20))
def test_length_classes_are_ordered_by_length_and_hold_equal_lengths_together(lengths, classes):
    found = length_classes(_examples(lengths), classes)
    assert set(found.tolist()) <= set(range(classes))
    for (shorter, low), (longer, high) in zip(
        sorted(zip(lengths, found, strict=True)), sorted(zip(lengths, found, strict=True))[1:], strict=False
    ):
        assert low == high if shorter == longer else low <= high


def test_length_classes_are_quantiles():
    found = length_classes(_examples(range(2, 82)), 8)
    assert Counter(found.tolist()) == dict.fromkeys(range(8), 10)


def test_a_small_alpha_gives_a_length_class_to_one_client_and_a_large_one_divides_it_evenly():
    examples = _examples(np.random.default_rng(0).integers(2, 300, 4000).tolist())
    classes = length_classes(examples, 8)
    largest = {}
    for alpha in (0.01, 1000.0):
        shares = divide(examples, 4, _spec("length", alpha))
        counts = np.array([np.bincount(classes[list(share)], minlength=8) for share in shares])  # (N, K)
        largest[alpha] = counts.max(axis=0) / counts.sum(axis=0)
    assert np.median(largest[0.01]) > 0.95
    assert largest[1000.0].max() < 0.3


def test_the_proportions_of_a_class_are_dirichlet():
    """With N clients a client's part of a class has mean 1/N and variance (N-1) / (N^2 (N alpha + 1))."""
    examples = _examples([10] * 400)
    alpha, clients = 0.5, 4
    parts = np.array(
        [
            [len(share) / 400 for share in divide(examples, clients, _spec("length", alpha), seed)]
            for seed in range(400)
        ]
    )
    variance = (clients - 1) / (clients**2 * (clients * alpha + 1))
    assert parts.mean(axis=0) == pytest.approx([0.25] * 4, abs=4 * (variance / 400) ** 0.5)
    assert parts.var(axis=0).mean() == pytest.approx(variance, rel=0.15)


def test_label_shares_follow_the_labels_and_not_the_lengths():
    examples = _examples(np.random.default_rng(0).integers(2, 300, 3000).tolist(), labels="abcde")
    shares = divide(examples, 4, _spec("label", alpha=0.01))
    owners = [
        Counter(client for client, share in enumerate(shares) for i in share if examples[i].label == label)
        for label in "abcde"
    ]
    assert np.median([owner.most_common(1)[0][1] / owner.total() for owner in owners]) > 0.95


def test_quantity_shares_differ_in_size_and_not_in_length():
    examples = _examples(np.random.default_rng(0).integers(2, 300, 4000).tolist())
    shares = divide(examples, 4, _spec("quantity", alpha=0.5), seed=1)
    sizes = [len(share) for share in shares]
    assert max(sizes) > 2 * min(sizes)
    means = [np.mean([len(examples[i]) for i in share]) for share in shares if len(share) > 200]
    assert means == pytest.approx([np.mean([len(one) for one in examples])] * len(means), rel=0.1)


def test_iid_shares_are_equal_in_size():
    assert sorted(len(share) for share in divide(_examples([5] * 11), 4, _spec("iid"))) == [2, 3, 3, 3]


def test_natural_shares_are_the_values_of_the_column_in_order():
    examples = [Example((1, 2), 1, site) for site in ("oslo", "bern", "oslo", "bern", "bern")]
    assert values_of(examples) == ("bern", "oslo")
    assert divide(examples, 2, _spec("natural")) == ((1, 3, 4), (0, 2))


def test_seeds_divide_differently():
    examples = _examples(range(2, 102))
    for by in ("length", "label", "quantity", "iid"):
        assert divide(examples, 4, _spec(by), seed=0) != divide(examples, 4, _spec(by), seed=1)


def test_impossible_divisions_name_the_counts():
    examples = [Example((1, 2), 1, site) for site in ("oslo", "bern", "oslo", "bern", "bern", "rome")]
    with pytest.raises(
        DataError, match=r"4 clients need at least 2 examples each, 8 in all, but there are 6"
    ):
        divide(examples, 4, _spec("length"))
    with pytest.raises(
        DataError, match=r"'topic' has 3 values \(bern, oslo, rome\), but there are 2 clients"
    ):
        divide(examples, 2, _spec("natural"))
    with pytest.raises(DataError, match=r"at least 2 examples, but these have fewer: 'rome' 1"):
        divide(examples, 3, _spec("natural"))
    with pytest.raises(DataError, match="0 clients"):
        divide(examples, 0, _spec("iid"))


@pytest.mark.parametrize("by", ["label", "natural"])
def test_examples_without_labels_cannot_be_divided_by_them(by):
    with pytest.raises(DataError, match=r"carry no labels.*clients.shares.column"):
        divide([Example((1, 2))] * 8, 2, _spec(by))


@pytest.mark.parametrize("by", ["label", "natural"])
def test_a_division_by_column_must_name_the_column(by):
    with pytest.raises(ValueError, match="give `column` too"):
        SharesSpec(by=by)


@pytest.fixture
def added():
    yield lambda divide, **facts: PARTITIONS.add("mine", Partition(divide, **facts))
    PARTITIONS._things.pop("mine", None)


def test_a_partition_of_a_plug_in_divides_by_its_name(added):
    added(lambda examples, clients, spec, generator: [range(1), range(1, len(examples))])
    assert divide(_examples([5] * 6), 2, _spec("mine"), minimum=1) == ((0,), (1, 2, 3, 4, 5))
    assert list(map(len, divide(_examples([5] * 6), 2, _spec("mine"), minimum=3))) == [3, 3]
    assert "mine" in SharesSpec.model_json_schema()["properties"]["by"]["enum"]


def test_a_partition_of_a_plug_in_that_needs_a_column_asks_for_it(added):
    added(lambda examples, clients, spec, generator: [], needs_column=True)
    with pytest.raises(ValueError, match="by: mine divides by the values of a column"):
        SharesSpec(by="mine")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([[0, 1, 2, 3]], "'mine' gives 1 shares for 2 clients"),
        ([[0, 1], [1, 2, 3]], "each of 4 examples to exactly one client.* it gives 5"),
        ([[0, 1], [2]], "it gives 3"),
    ],
)
def test_a_partition_of_a_plug_in_loses_and_repeats_nothing(added, parts, message):
    added(lambda examples, clients, spec, generator: parts)
    with pytest.raises(DataError, match=message):
        divide(_examples([5] * 4), 2, _spec("mine"))
