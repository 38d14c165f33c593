"""Fingerprints are equal for equal text, however it is ordered, batched or divided, and for no other."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from splitft.data.fingerprint import fingerprint, fingerprint_of_batches
from splitft.data.text import Example, eval_batches
from splitft.tracking.comparability import common_fingerprint

EXAMPLES = st.lists(
    st.lists(st.integers(0, 50000), min_size=2, max_size=9).map(lambda tokens: Example(tuple(tokens))),
    min_size=2,
    max_size=8,
)


@given(EXAMPLES, st.randoms(use_true_random=False), st.integers(1, 3))
def test_order_batches_and_owners_do_not_matter(examples, random, batch_size):
    whole = fingerprint(examples)
    shuffled = list(examples)
    random.shuffle(shuffled)
    assert fingerprint(shuffled) == whole
    assert fingerprint_of_batches(eval_batches(examples, batch_size)) == whole
    assert common_fingerprint([fingerprint(shuffled[:1]), fingerprint(shuffled[1:])]) == whole


@given(EXAMPLES)
def test_any_change_shows(examples):
    first, *others = examples
    changed = Example((first.tokens[0] + 1, *first.tokens[1:]))
    assert len({
        fingerprint(examples), fingerprint([changed, *others]), fingerprint(others),
        fingerprint([first, *examples]), fingerprint([first, first, *examples]),
    }) == 5  # fmt: skip


def test_where_the_loss_begins_is_part_of_it():
    assert fingerprint([Example((1, 2, 3), 1)]) != fingerprint([Example((1, 2, 3), 2)])


def test_what_is_not_known_stays_so():
    assert common_fingerprint(["", "0a"]) is None
    assert common_fingerprint([]) is None
