"""Codecs: each keeps the error that it states, on any rows, and takes the bytes that it says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from splitft.codecs import CODECS, CodecContext, codec_of
from splitft.codecs.quantize import pack_bits, unpack_bits
from splitft.codecs.rotation import rotated, rotated_back
from splitft.errors import WireError
from splitft.specs import CodecChoice, WireSpec
from splitft.specs.codecs import codecs_for
from splitft.specs.wire import AUTO

NAMES = sorted(CODECS)
CASTS = ("bf16", "fp32", "fp64")
SHAPES = [(), (0, 3), (1, 1), (2, 3), (2, 3, 4), (5, 64), (3, 100), (7, 130), (9, 576)]


@st.composite
def rows(draw) -> torch.Tensor:
    """Rows of any size and scale, some with outliers, some alike, some nought."""
    shape = (draw(st.integers(1, 12)), draw(st.sampled_from([1, 2, 7, 32, 64, 96, 130])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(shape, generator=generator) + draw(st.sampled_from([0.0, 3.0]))
    x *= torch.exp2(torch.randint(-6, 7, (shape[0], 1), generator=generator).float())
    x[torch.rand(shape, generator=generator) < 0.02] *= 100
    x[torch.rand(shape[0], generator=generator) < 0.1] = 0
    return x * 10.0 ** draw(st.integers(-9, 6))


def _error(codec, x, context):
    """Each row's error and its stated bound."""
    encoded = codec.encode(x, context)
    codec.layout(encoded.shape, encoded.parameters)
    decoded = codec.decode(encoded, torch.float64, context)
    assert (decoded.dtype, decoded.shape) == (torch.float64, x.shape)
    error = (decoded - x.double()).reshape(len(x), -1).norm(dim=1)
    return error, codec.error_bound(encoded, context)


@pytest.mark.parametrize("role", ["hidden", "gradient"])
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(x=rows(), seed=st.integers(0, 9))
def test_no_row_is_off_by_more_than_the_codec_states(name, role, x, seed):
    error, bound = _error(codec_of(name), x, CodecContext(role, seed))
    assert bool((error <= bound).all()), (error / bound).max()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("fp64", "fp32", "topk", "bounded")])
def test_the_stated_error_is_not_far_above_the_real_one(name):
    x = torch.randn(64, 576, generator=torch.Generator().manual_seed(0))
    error, bound = _error(codec_of(name), x, CodecContext("hidden"))
    assert float((bound / error).median()) < 3.5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shape_type_layout_and_bytes_are_as_stated(name, shape):
    codec, context = codec_of(name), CodecContext("hidden")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    encoded = codec.encode(x, context)
    encoded.entry.check("hidden", codec.layout(shape, encoded.parameters))
    assert not any(part.requires_grad for part in encoded.parts.values())
    decoded = codec.decode(encoded, torch.float32, context)
    assert (decoded.dtype, decoded.shape) == (torch.float32, x.shape)
    assert decoded.is_contiguous()  # or every product with it would be slow
    if name not in ("bounded", "temporal", "principal"):  # whose size follows the data
        assert encoded.nbytes == codec.bytes_for(shape)


@pytest.mark.parametrize(
    ("name", "less"), [("int8", 3.85), ("fp8", 3.9), ("int4", 7.4), ("int2", 14.0), ("topk", 16.0)]
)
def test_bytes_shrink_as_the_names_promise(name, less):
    shape = (512, 576)
    assert 4 * math.prod(shape) / codec_of(name).bytes_for(shape) >= less


@pytest.mark.parametrize("name", CASTS)
def test_what_the_wire_type_holds_travels_unchanged(name):
    codec = codec_of(name)
    x = torch.tensor([0.0, -0.0, 1.0, -1.5, 2.0**-20, 2.0**100], dtype=codec.dtype)
    assert torch.equal(codec.decode(codec.encode(x, CodecContext()), codec.dtype, CodecContext()), x)


def test_rounding_to_bfloat16_is_to_the_nearest_even():
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8], dtype=torch.float32)  # each halfway between neighbours
    assert codec_of("bf16").encode(x, CodecContext()).parts[""].tolist() == [1.0, 1 + 2**-6]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_rows_and_seed_give_the_same_bytes(name):
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    for role in ("hidden", "gradient"):
        first, again = (codec_of(name).encode(x, CodecContext(role, 7, {})) for _ in range(2))
        assert first.parameters == again.parameters
        assert all(torch.equal(first.parts[part], again.parts[part]) for part in first.parts)


@pytest.mark.parametrize("name", ["int8", "int4", "bounded:rel=0.3", "temporal"])
def test_gradients_are_right_on_average(name):
    codec, draws = codec_of(name), 600
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    total = torch.zeros_like(x)
    for seed in range(draws):
        context = CodecContext("gradient", seed)
        total += codec.decode(codec.encode(x, context), torch.float32, context)
    bound = codec.error_bound(codec.encode(x, CodecContext("gradient")), CodecContext("gradient"))[:, None]
    per_number = bound / 8 / math.sqrt(12 / 4)  # a step a number; rounding at random has at most half of it
    assert bool(((total / draws - x).abs() < 5 * per_number / math.sqrt(draws) + 2e-2).all())


@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
def test_channels_far_larger_than_others_cost_the_others_nothing(name):
    x = torch.randn(50, 576, generator=torch.Generator().manual_seed(5))
    large, context = x.clone(), CodecContext("hidden")
    large[:, [3, 300]] *= 1000
    found, wanted = (
        codec_of(name).decode(codec_of(name).encode(rows, context), torch.float32, context)
        for rows in (large, x)
    )
    others = [channel for channel in range(576) if channel not in (3, 300)]
    error, usual = ((one - x)[:, others].norm() for one in (found, wanted))
    assert float(error) < 1.1 * float(usual)
    assert float((found - large)[:, [3, 300]].norm()) < float(large[:, [3, 300]].norm()) / 256


def test_of_a_row_alone_int8_takes_nothing_apart():
    encoded = codec_of("int8").encode(torch.randn(1, 4096), CodecContext("adapter"))
    assert encoded.nbytes == 4096 + 64
    assert [encoded.parts[name].numel() for name in ("mean", "channels", "apart")] == [0, 0, 0]


@given(st.lists(st.integers(0, 15), max_size=40), st.sampled_from([2, 4]))
def test_packed_codes_come_back(codes, bits):
    given_codes = torch.tensor([code % 2**bits for code in codes], dtype=torch.uint8)
    packed = pack_bits(given_codes, bits)
    assert len(packed) == -(-len(codes) * bits // 8)
    assert torch.equal(unpack_bits(packed, bits, len(codes)), given_codes)
    with pytest.raises(WireError, match="codes; expected"):
        unpack_bits(packed, bits, len(packed) * 8 // bits + 1)


@pytest.mark.parametrize("width", [1, 3, 32, 64, 130, 576, 768, 4160])
def test_the_rotation_keeps_lengths_and_is_undone(width):
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(3))
    turned = rotated(x)
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(rotated_back(turned), x)


def test_the_rotation_spreads_an_outlier_over_its_row():
    x = torch.zeros(1, 576)
    x[0, 100] = 1.0
    assert float(rotated(x).abs().max()) < 0.15


@settings(max_examples=40, deadline=None)
@given(x=rows(), bound=st.floats(1e-4, 0.5), kind=st.sampled_from(["abs", "rel"]))
def test_no_number_breaks_the_bound_of_the_user(x, bound, kind):
    unit = (
        x.double().square().mean(1, keepdim=True).sqrt() if kind == "rel" else torch.ones(len(x), 1).double()
    )
    assume(kind == "rel" or float(x.abs().max()) < 2**28 * bound)
    codec = codec_of(f"bounded:{kind}={bound}")
    for role in ("hidden", "gradient"):
        decoded = codec.decode(codec.encode(x, CodecContext(role)), torch.float64, CodecContext(role))
        assert bool(((decoded - x.double()).abs() <= bound * unit + 1e-29).all())


def test_a_bound_out_of_reach_is_refused():
    with pytest.raises(WireError, match="give a larger one"):
        codec_of("bounded:abs=1e-9").encode(torch.full((1, 2), 1e6), CodecContext())


@pytest.mark.parametrize("name", ["int2", "topk"])
def test_what_is_left_out_is_owed_and_stays_bounded(name):
    codec, memory = codec_of(name), {}
    generator = torch.Generator().manual_seed(4)
    mean = torch.randn(64, generator=generator)
    sent, wanted, owed = torch.zeros(64), torch.zeros(64), []
    for _ in range(200):
        x = (
            torch.randn(int(torch.randint(3, 9, (), generator=generator)), 64, generator=generator)
            + 0.1 * mean
        )
        context = CodecContext("gradient", 0, memory)
        sent += codec.decode(codec.encode(x, context), torch.float32, context).sum(0)
        wanted += x.sum(0)
        owed.append(float(memory["owed"].norm()))
        torch.testing.assert_close(wanted - sent, memory["owed"], atol=1e-2, rtol=1e-3)
    assert max(owed[100:]) < 2 * max(owed[20:100])
    plain = sum(codec_of(name).encode(x, CodecContext("gradient")).nbytes for _ in range(1))
    assert plain == codec.bytes_for(tuple(x.shape))


@pytest.mark.parametrize(
    ("name", "part", "value", "due"),
    [
        ("int4", "channels", -1, "outlier channels"),
        ("int4", "channels", 10**6, "outlier channels"),
        ("topk", "places", 9999, "must rise within"),
        ("topk", "places", 0, "must rise within"),
        ("bounded", "codes", 0, "codes"),
    ],
)
def test_contents_that_lie_are_refused(name, part, value, due):
    codec = codec_of(name)
    encoded = codec.encode(torch.randn(4, 130), CodecContext())
    encoded.parts[part].fill_(value)
    with pytest.raises(WireError, match=due):
        codec.decode(encoded, torch.float32, CodecContext())


@pytest.mark.parametrize("name", NAMES)
def test_parameters_that_are_not_the_codecs_own_are_refused(name):
    wrong = {"top": 1000, "nbytes": 3, "sent": -1, "stage": 9, "examples": 0}
    with pytest.raises(WireError):
        codec_of(name).layout((4, 64), wrong)


def test_the_configuration_offers_every_codec_and_no_other():
    for role, known in (
        ("hidden", [*CODECS, AUTO]),
        ("gradient", [*CODECS, AUTO]),
        ("adapter", ["fp64", "fp32", "bf16", "int8"]),
    ):
        assert codecs_for(role) == [name for name in known if name != AUTO]
        pattern = WireSpec.model_json_schema()["properties"][role]["pattern"]
        assert pattern.strip("^$()").split("|") == list(known)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("bounded:rel=1e-2", codec_of("bounded")),
        ("bounded:abs=0.1", None),
        ("temporal:skip=0.2,megabytes=8", None),
        ("topk:share=8", None),
        ("principal:bits=3", None),
    ],
)
def test_options_reach_the_codec(text, found):
    codec = codec_of(text)
    assert found is None or codec == found
    assert str(CodecChoice.parse(str(CodecChoice.parse(text)))) == str(CodecChoice.parse(text))
    assert codec is codec_of(text)
