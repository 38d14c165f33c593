"""Codecs that remember: both ends stay alike, what they learn pays, and ends that disagree find out."""

from __future__ import annotations

import contextlib
import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitft.codecs import CodecContext, codec_of
from splitft.codecs import entropy_coder as entropy
from splitft.codecs.principal_axes import Axes, learn
from splitft.errors import WireError
from splitft.protocol.codec_state import CodecState

WIDTH = 48


def _hidden(rows: int, seed: int) -> torch.Tensor:
    """Rows with a mean and few directions of large spread, some rows longer than others."""
    fixed = torch.Generator().manual_seed(99)
    mix = torch.randn(WIDTH, WIDTH, generator=fixed) * torch.logspace(0, -2, WIDTH)
    mean = torch.randn(WIDTH, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, WIDTH, generator=generator) @ mix.T + mean
    return x * torch.exp(0.3 * torch.randn(rows, 1, generator=generator))


def _relative(decoded, x):
    return float((decoded - x).norm() / x.norm())


@pytest.mark.parametrize("bits", [1.5, 2.0, 3.0, 6.0])
def test_axes_are_learnt_and_then_rows_take_the_bits_that_were_asked_for(bits):
    codec, sender, receiver = codec_of(f"principal:bits={bits}"), {}, {}
    sizes, errors, stages = [], [], []
    for step in range(16):
        x = _hidden(100, step)
        encoded = codec.encode(x, CodecContext("hidden", memory=sender))
        encoded.entry.check("hidden", codec.layout(encoded.shape, encoded.parameters))
        bound_memory = dict(receiver)
        decoded = codec.decode(encoded, torch.float32, CodecContext("hidden", memory=receiver))
        bound = codec.error_bound(encoded, CodecContext("hidden", memory=bound_memory))
        assert bool(((decoded - x).norm(dim=1) <= bound).all())
        sizes.append(encoded.nbytes * 8 / x.numel())
        errors.append(_relative(decoded, x))
        stages.append(encoded.parameters["stage"])
    learnt = [step for step, stage in enumerate(stages) if stage == 1]
    assert learnt == [0, 2, 8]  # after 2 D rows, three and nine times as many
    assert set(stages[learnt[0] :]) == {1, 2}
    assert sum(sizes[9:]) / 7 == pytest.approx(bits, rel=0.1)
    assert torch.equal(sender["basis"], receiver["basis"])
    assert receiver.keys() == {"basis", "facts"}
    if bits == 2.0:
        plain = codec_of("int2").encode(x, CodecContext("hidden"))
        int2 = _relative(codec_of("int2").decode(plain, torch.float32, CodecContext("hidden")), x)
        assert max(errors[6:]) < 0.6 * int2


def test_gradients_take_the_same_way_rounded_at_random():
    codec, sender, receiver = codec_of("principal:bits=3"), {}, {}
    for step in range(6):
        x = _hidden(100, step)
        encoded = codec.encode(x, CodecContext("gradient", step, sender))
        before = dict(receiver)
        decoded = codec.decode(encoded, torch.float32, CodecContext("gradient", step, receiver))
        bound = codec.error_bound(encoded, CodecContext("gradient", step, before))
        assert bool(((decoded - x).norm(dim=1) <= bound).all())


def test_rows_unlike_what_was_learnt_travel_apart():
    codec, sender, receiver = codec_of("principal"), {}, {}
    for step in range(3):
        x = _hidden(60, step)
        x[7] = torch.randn(WIDTH, generator=torch.Generator().manual_seed(step)) * 1e4
        encoded = codec.encode(x, CodecContext("hidden", memory=sender))
        decoded = codec.decode(encoded, torch.float32, CodecContext("hidden", memory=receiver))
    assert 7 in encoded.parts["places"].tolist()
    assert _relative(decoded[7], x[7]) < 0.2


def test_tokens_that_attention_rests_on_travel_apart_and_exactly_since_they_are_alike():
    codec, sender, receiver = codec_of("principal"), {}, {}
    sink = 300 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(5))
    for step in range(6):
        x = _hidden(60, step)
        x = x / x.square().mean(1, keepdim=True).sqrt()
        x[[0, 20, 40]] += sink
        encoded = codec.encode(x, CodecContext("hidden", memory=sender))
        decoded = codec.decode(encoded, torch.float32, CodecContext("hidden", memory=receiver))
    assert {0, 20, 40} <= set(encoded.parts["places"].tolist())
    assert _relative(decoded[[0, 20, 40]], x[[0, 20, 40]]) < 0.01


@given(st.floats(0.002, 2), st.integers(0, 99))
def test_whole_numbers_come_back_from_their_lines_and_rows_beyond_are_told(step, seed):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(1, -3, WIDTH)
    grid = Axes(torch.eye(WIDTH), torch.zeros(WIDTH), spread).grid(step)
    codes = (torch.randn(30, WIDTH, generator=generator) * spread / step).round()[:, grid.coded]
    codes[0] *= 100
    inside = grid.within(codes)
    assert inside.sum() >= 20
    lines = grid.lines(codes[inside])
    assert lines.shape[1] == len(grid.classes)
    assert np.abs(lines).max() <= entropy.LARGEST
    assert torch.equal(grid.numbers(lines)[:, grid.coded], codes[inside] * step)


def test_axes_learnt_from_few_rows_are_not_as_thin_as_chance_made_them():
    rows = torch.randn(2 * WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    memory = {}
    assert learn(rows, memory)
    spread = memory["facts"][2]
    energies = torch.linalg.eigvalsh(torch.cov(rows.T / rows.square().mean(1).sqrt(), correction=0))
    assert float(spread.square().min()) > float(energies.min()) + 0.03
    assert float(spread.square().mean()) == pytest.approx(1.0, abs=0.05)


def test_what_codes_are_said_to_take_is_what_they_take():
    generator = np.random.default_rng(1)
    spread = np.repeat([0.3, 1.0, 5.0], 400)
    codes = np.rint(generator.normal(size=(1200, 10)) * spread[:, None]).astype(np.int16)
    classes = entropy.class_of(spread)
    coded = 8 * (len(entropy.encode(codes, classes)) - 2 * 10)  # half of each state is there from the start
    assert entropy.taken_bits(codes, classes) == pytest.approx(coded, rel=0.01)


def test_axes_that_never_came_are_asked_for():
    codec, sender = codec_of("principal"), {}
    for step in range(3):
        encoded = codec.encode(_hidden(60, step), CodecContext("hidden", memory=sender))
    with pytest.raises(WireError, match="axes of this stream are not known here"):
        codec.decode(encoded, torch.float32, CodecContext("hidden", memory={}))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 999))
def test_entropy_coding_gives_back_every_symbol(lines, lanes, seed):
    generator = np.random.default_rng(seed)
    spread = np.exp2(generator.uniform(-4, 7, lines))
    classes = entropy.class_of(spread)
    codes = np.clip(np.rint(generator.standard_t(2, (lines, lanes)) * spread[:, None]), -127, 127)
    codes = codes.astype(np.int16)
    data = entropy.encode(codes, classes)
    assert np.array_equal(entropy.decode(data, classes, lanes), codes)
    with pytest.raises(WireError):
        entropy.decode(data[:-2], classes, lanes)
    with pytest.raises(WireError):
        entropy.decode(data + b"\0\0", classes, lanes)


def test_entropy_coding_takes_hardly_more_than_the_entropy():
    generator = np.random.default_rng(0)
    spread = np.full(400, 1.5)
    codes = np.rint(generator.normal(size=(400, 200)) * 1.5).astype(np.int16)
    bits = (len(entropy.encode(codes, entropy.class_of(spread))) - 4 * 200) * 8 / codes.size
    ideal = math.log2(1.5 * math.sqrt(2 * math.pi * math.e))
    assert bits < ideal + 0.06


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=120), st.integers(1, 4))
def test_entropy_decoding_of_any_bytes_ends_in_codes_or_an_error(data, lanes):
    classes = entropy.class_of(np.array([0.5, 1.0, 4.0]))
    with contextlib.suppress(WireError):
        assert entropy.decode(data, classes, lanes).shape == (3, lanes)


EXAMPLES = ((3, 5), (8, 7))


def _epochs(codec, change: float, epochs: int = 3):
    """The same two examples again and again, a little changed each time; bytes and errors."""
    ends, sizes, errors = ({}, {}), [], []
    x = _hidden(12, 0)
    for epoch in range(epochs):
        x = x + change * x.norm(dim=1, keepdim=True) / math.sqrt(WIDTH) * _hidden(12, epoch + 1).sign()
        encoded = codec.encode(x, CodecContext("hidden", memory=ends[0], examples=EXAMPLES))
        encoded.entry.check("hidden", codec.layout(encoded.shape, encoded.parameters))
        decoded = codec.decode(encoded, torch.float32, CodecContext("hidden", memory=ends[1], examples=()))
        sizes.append(encoded.nbytes)
        errors.append((decoded - x).norm(dim=1) / x.norm(dim=1))
    assert ends[0].keys() == ends[1].keys() == {"3", "8"}
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    return sizes, errors


def test_what_hardly_changed_is_not_sent_again():
    sizes, errors = _epochs(codec_of("temporal:skip=0.2"), change=0.01)
    assert sizes[1] < 0.7 * sizes[0]
    assert float(errors[1].max()) <= 0.2


def test_what_changed_a_little_is_sent_more_exactly_than_the_first_time():
    _, errors = _epochs(codec_of("temporal:skip=0.001"), change=0.05)
    assert float(errors[1].mean()) < 0.3 * float(errors[0].mean())


def test_a_budget_of_memory_is_kept_by_both_ends():
    codec, ends = (
        codec_of("temporal:megabytes=0.001"),
        ({}, {}),
    )  # 1000 bytes: example 3 takes 480, 8 takes 672
    for _ in range(2):
        encoded = codec.encode(_hidden(12, 0), CodecContext("hidden", memory=ends[0], examples=EXAMPLES))
        codec.decode(encoded, torch.float32, CodecContext("hidden", memory=ends[1]))
    assert ends[0].keys() == ends[1].keys() == {"3"}


def test_ends_that_remember_different_things_find_out():
    codec, memory = codec_of("temporal"), {}
    for _ in range(2):
        encoded = codec.encode(_hidden(12, 0), CodecContext("hidden", memory=memory, examples=EXAMPLES))
    with pytest.raises(WireError, match="the sender remembers 2 examples, this side 0"):
        codec.decode(encoded, torch.float32, CodecContext("hidden", memory={}))
    lie = copy.deepcopy(memory)
    lie["9"] = lie.pop("3")
    with pytest.raises(WireError, match="not remembered here"):
        codec.decode(encoded, torch.float32, CodecContext("hidden", memory=lie))


def test_state_come_back_from_a_checkpoint_and_forget_another_cut():
    state = CodecState(seed=1, client="a")
    state.begin_round(3)
    state.begin_batch(True, [(4, 5, 2)])
    context = state.context("Activations", "hidden", 7)
    assert context.examples == ((4, 5),)
    assert state.context("LastHidden", "hidden", 7).examples == ((4, 2),)
    assert context.seed != state.context("Activations", "hidden", 8).seed
    context.memory["owed"] = torch.ones(2)
    state.begin_batch(False, [])
    assert state.context("Activations", "hidden", 7).memory == {}
    again = CodecState(seed=1, client="a")
    again.restore(state.tensors())
    again.begin_round(3)
    again.begin_batch(True, [])
    assert torch.equal(again.context("Activations", "hidden", 7).memory["owed"], torch.ones(2))
    again.begin_round(4)
    assert again.context("Activations", "hidden", 7).memory == {}
