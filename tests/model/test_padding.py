"""Packing is the inverse of padding, and picking is a direct loop."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from splitft.model import pack, pad, pick

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def _rows(count: int) -> torch.Tensor:
    """(count, 3), all numbers different and none zero."""
    return torch.arange(1.0, 1 + count * 3).view(count, 3)


@given(LENGTHS, st.none() | st.integers(0, 4))
def test_packed_rows_survive_padding_and_the_padding_is_zero(lengths, spare):
    packed = _rows(sum(lengths))
    width = None if spare is None else max(lengths) + spare
    padded = pad(packed, lengths, width)
    assert padded.shape == (len(lengths), width or max(lengths), 3)
    assert torch.equal(pack(padded, lengths), packed)
    real = torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None]
    assert torch.count_nonzero(padded[~real]) == 0
    assert torch.equal(padded[real], packed)


@given(LENGTHS, st.integers(0, 4))
def test_packing_keeps_the_real_tokens_in_order_and_nothing_else(lengths, spare):
    hidden = _rows(len(lengths) * (max(lengths) + spare)).view(len(lengths), -1, 3)
    expected = [hidden[b, t] for b, length in enumerate(lengths) for t in range(length)]
    assert torch.equal(pack(hidden, lengths), torch.stack(expected))


@given(LENGTHS, st.data())
def test_picking_takes_the_labelled_ranges(lengths, data):
    hidden = _rows(len(lengths) * max(lengths)).view(len(lengths), -1, 3)
    ranges = [
        tuple(sorted(data.draw(st.tuples(st.integers(0, length), st.integers(0, length)))))
        for length in lengths
    ]
    expected = [hidden[b, t] for b, (start, stop) in enumerate(ranges) for t in range(start, stop)]
    assert torch.equal(pick(hidden, ranges), torch.stack(expected) if expected else hidden.new_zeros(0, 3))


@given(LENGTHS)
def test_gradients_pass_through_packing_and_padding_to_the_real_tokens_alone(lengths):
    hidden = _rows(len(lengths) * max(lengths)).view(len(lengths), -1, 3).requires_grad_()
    pad(pack(hidden, lengths), lengths).sum().backward()
    real = torch.arange(hidden.shape[1]) < torch.tensor(lengths)[:, None]
    assert torch.equal(hidden.grad, real[..., None].expand_as(hidden).float())
