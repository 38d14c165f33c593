"""Codecs: each keeps the relative error that it states, over the whole normal range of its type."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitft.specs import WireSpec
from splitft.wire import CODECS

NAMES = sorted(CODECS)


def _spread(name: str) -> st.SearchStrategy[float]:
    """Numbers of either sign over the normal range that the codec's type shares with float64."""
    info = torch.finfo(CODECS[name].dtype)
    largest = info.max / 2  # a number above may round to infinity
    size = st.floats(info.tiny, largest, allow_subnormal=False)
    return st.builds(lambda x, sign: x * sign, size, st.sampled_from((-1, 1)))


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_a_number_suffers_at_most_the_stated_relative_error(name, data):
    codec = CODECS[name]
    x = torch.tensor(data.draw(st.lists(_spread(name), min_size=1, max_size=20)), dtype=torch.float64)
    decoded = codec.decode(codec.encode(x), torch.float64)
    assert bool(((decoded - x).abs() <= codec.relative_error * x.abs()).all())


@pytest.mark.parametrize("name", NAMES)
def test_the_stated_error_is_not_far_above_the_real_one(name):
    codec, generator = CODECS[name], torch.Generator().manual_seed(0)
    x = torch.rand(10_000, generator=generator, dtype=torch.float64) + 1
    worst = ((codec.decode(codec.encode(x), torch.float64) - x).abs() / x).max()
    assert worst > 0.9 * codec.relative_error or codec.dtype == torch.float64


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3), (2, 3, 4)])
def test_shape_type_and_payload_are_as_stated(name, shape):
    codec, x = CODECS[name], torch.ones(shape, requires_grad=True)
    encoded = codec.encode(x)
    assert (encoded.dtype, encoded.shape, encoded.requires_grad) == (codec.dtype, x.shape, False)
    assert encoded.numel() * encoded.dtype.itemsize == codec.bytes_per_element * x.numel()
    assert codec.decode(encoded, torch.float64).dtype == torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_what_the_wire_type_holds_travels_unchanged(name):
    codec = CODECS[name]
    x = torch.tensor([0.0, -0.0, 1.0, -1.5, 2.0**-20, 2.0**100], dtype=codec.dtype)
    assert torch.equal(codec.decode(codec.encode(x), codec.dtype), x)


def test_rounding_to_bfloat16_is_to_the_nearest_even():
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8], dtype=torch.float32)  # each halfway between neighbours
    assert CODECS["bf16"].encode(x).tolist() == [1.0, 1 + 2**-6]


def test_the_configuration_offers_every_codec_and_no_other():
    for role in ("hidden", "gradient", "adapter"):
        pattern = WireSpec.model_json_schema()["properties"][role]["pattern"]
        assert set(pattern.strip("^$()").split("|")) == set(CODECS)
    assert get_args(WireSpec.model_fields["in_process"].annotation) == ("bytes", "direct")
