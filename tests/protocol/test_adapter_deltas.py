"""Changes of adapters: both ends always hold the same, exact stays exact, and debts never grow."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitft.codecs import Encoded
from splitft.errors import WireError
from splitft.protocol.adapter_deltas import SAME, DeltaState, version_of

NAME = "7.self_attn.q_proj.A"


def _whole(tensor: torch.Tensor) -> Encoded:
    return Encoded("adapter", "fp32", tensor.dtype, tuple(tensor.shape), {"": tensor.clone()})


def _int8(tensor: torch.Tensor) -> Encoded:
    """One scale a tensor, written here anew."""
    scale = tensor.abs().max().clamp_min(1e-30) / 127
    parts = {"codes": (tensor / scale).round().to(torch.int8), "scale": scale}
    return Encoded("adapter", "int8", tensor.dtype, tuple(tensor.shape), parts)


def _bf16(tensor: torch.Tensor) -> Encoded:
    return Encoded("adapter", "bf16", tensor.dtype, tuple(tensor.shape), {"": tensor.bfloat16()})


def _read(encoded: Encoded) -> torch.Tensor:
    if encoded.codec == "int8":
        return encoded.parts["codes"].float() * encoded.parts["scale"]
    return encoded.parts[""].to(encoded.dtype)


WRITERS = {"int8": _int8, "bf16": _bf16}
SHARE = {"int8": 0.5 / 127, "bf16": 2.0**-8}
"""Largest error of a number, as a share of the tensor's largest."""


class Line:
    """Two ends that talk."""

    def __init__(self, writer, exact=False, feedback=True) -> None:
        self.writer = writer
        self.client = DeltaState(exact, feedback)
        self.server = DeltaState(exact, feedback)

    def down(self, tensor, name=NAME):
        return self._pass("global", name, tensor, self.server, self.client)

    def up(self, tensor, name=NAME):
        return self._pass("own", name, tensor, self.client, self.server)

    def _pass(self, way, name, tensor, sender, receiver):
        encoded = sender.encode(way, name, tensor, self.writer, _read)
        arrived = receiver.decode(way, name, encoded, _read)
        assert sender.held.keys() == receiver.held.keys()
        for slot, one in sender.held.items():
            assert torch.equal(one, receiver.held[slot])  # to the last bit
        return encoded, arrived


def _rounds(seed: int, count: int):
    """What a client trains and what comes of it, round by round, shapes as they are at a cut that moves."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(4, 6, generator=generator)
    for _ in range(count):
        trained = factor + 0.01 * torch.randn(factor.shape, generator=generator)
        yield trained
        factor = trained + 0.005 * torch.randn(factor.shape, generator=generator)
        yield factor


@given(st.integers(0, 10_000), st.integers(1, 8))
def test_an_exact_codec_delivers_every_bit_whatever_is_held(seed, count):
    line = Line(_whole, exact=True)
    for index, tensor in enumerate(_rounds(seed, count)):
        _, arrived = line.up(tensor) if index % 2 == 0 else line.down(tensor)
        assert torch.equal(arrived, tensor)


@pytest.mark.parametrize("writer", [_whole, _int8])
def test_what_the_other_side_holds_already_does_not_travel(writer):
    line = Line(writer, exact=writer is _whole)
    _, held = line.down(torch.arange(6.0).reshape(2, 3))
    for encoded, arrived in (line.down(held), line.up(held)):
        assert (encoded.codec, encoded.nbytes) == (SAME, 0)
        assert torch.equal(arrived, held)


@pytest.mark.parametrize("name", WRITERS)
@given(seed=st.integers(0, 10_000))
def test_from_the_server_errors_never_add_up(name, seed):
    line, held = Line(WRITERS[name]), torch.zeros(4, 6)
    for index, tensor in enumerate(list(_rounds(seed, 12))[1::2]):
        encoded, arrived = line.down(tensor)
        assert encoded.parameters.get("base") == ("global" if index else None)
        worst = float((arrived - tensor).abs().max())
        assert worst <= SHARE[name] * float((tensor - held).abs().max()) * 1.01 + 1e-6
        held = arrived
    assert worst < 1e-3  # of factors of about 1: a rounding of a difference, not of the whole


@pytest.mark.parametrize("name", WRITERS)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 12))
def test_the_sum_of_uploads_misses_one_rounding_alone(name, seed, count):
    line, missed = Line(WRITERS[name]), torch.zeros(4, 6)
    for index, tensor in enumerate(_rounds(seed, count)):
        if index % 2:
            line.down(tensor)
            continue
        _, arrived = line.up(tensor)
        missed += tensor - arrived
        assert torch.allclose(missed, line.client.residuals[NAME], atol=1e-5)
        assert float(missed.abs().max()) < 0.02


@given(seed=st.integers(0, 10_000))
def test_without_feedback_the_sum_misses_more(seed):
    sums = {}
    for feedback in (True, False):
        line, missed = Line(_int8, feedback=feedback), torch.zeros(4, 6)
        for index, tensor in enumerate(_rounds(seed, 60)):
            if index % 2:
                line.down(tensor)
            else:
                missed += tensor - line.up(tensor)[1]
        sums[feedback] = float(missed.norm())
        assert bool(line.client.residuals) == feedback
    assert sums[True] < sums[False]


def test_a_difference_is_finer_than_the_whole_in_as_many_bytes():
    line, tensors = Line(_int8), list(_rounds(0, 3))
    first, _ = line.down(tensors[1])
    second, arrived = line.down(tensors[3])
    assert first.nbytes == second.nbytes
    whole = _read(_int8(tensors[3]))
    assert float((arrived - tensors[3]).norm()) < 0.1 * float((whole - tensors[3]).norm())


def test_a_whole_tensor_travels_where_the_difference_would_be_larger():
    line = Line(_int8)
    line.down(torch.ones(2, 3))
    encoded, _ = line.down(-torch.ones(2, 3))
    assert "base" not in encoded.parameters
    encoded, _ = line.down(torch.ones(3, 3))  # another rank
    assert "base" not in encoded.parameters


def test_a_difference_to_another_version_is_refused_and_the_whole_is_taken():
    line = Line(_int8)
    line.down(torch.ones(2, 3))
    encoded = line.server.encode("global", NAME, torch.full((2, 3), 1.5), _int8, _read)
    for state in (
        DeltaState(exact=False),
        DeltaState(exact=False, held={f"global/{NAME}": torch.zeros(2, 3)}),
    ):
        with pytest.raises(WireError, match=f"difference to version {version_of(torch.ones(2, 3)):08x}"):
            state.decode("global", NAME, encoded, _read)
    line.client.clear()
    line.server.clear()
    encoded, arrived = line.down(torch.full((2, 3), 1.5))
    assert "base" not in encoded.parameters
    assert torch.allclose(arrived, torch.full((2, 3), 1.5))


@pytest.mark.parametrize(
    "parameters",
    [{}, {"base": "global"}, {"base": "own", "version": 1}, {"base": "x", "version": 1}, {"base": 3},
     {"base": "global", "version": "1"}, {"base": "global", "version": 2**40}],
    ids=str,
)  # fmt: skip
def test_a_reference_that_nobody_holds_is_refused(parameters):
    line = Line(_int8)
    line.down(torch.ones(2, 3))
    encoded = Encoded("adapter", SAME, torch.float32, (2, 3), {}, parameters)
    with pytest.raises(WireError, match="has to send the whole"):
        line.client.decode("global", NAME, encoded, _read)


def test_a_reference_of_another_shape_is_refused():
    line = Line(_int8)
    encoded, held = line.down(torch.ones(2, 3))
    about = {"base": "global", "version": version_of(held)}
    for changed in ({"shape": (3, 2)}, {"dtype": torch.float64}):
        lying = dataclasses.replace(encoded, codec=SAME, parts={}, parameters=about, **changed)
        with pytest.raises(WireError, match="has to send the whole"):
            line.client.decode("global", NAME, lying, _read)


def test_a_cut_that_moves_back_forgets_the_blocks_given_up():
    line = Line(_int8)
    for name in ("1.q.A", "2.q.A"):
        line.down(torch.ones(2, 3), name)
        line.up(torch.ones(2, 3) * 1.1, name)
    line.client.begin_round(2)
    assert {name.rpartition("/")[2] for name in line.client.tensors()} == {"1.q.A"}


def test_what_is_kept_is_all_there_is():
    line = Line(_int8)
    for index, tensor in enumerate(_rounds(1, 2)):
        (line.down if index % 2 else line.up)(tensor)
    again = DeltaState(exact=False, feedback=True)
    again.restore(line.client.tensors())
    tensor = torch.full((4, 6), 0.3)
    one, other = (h.encode("own", NAME, tensor, _int8, _read) for h in (line.client, again))
    assert one.parameters == other.parameters
    assert torch.equal(one.parts["codes"], other.parts["codes"])
    assert dict(again.global_factors()).keys() == {NAME}
