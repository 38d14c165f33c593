"""Messages: each arrives as it was sent, and what may not travel is refused with what was due."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from splitft.adapters import AdapterState, Factors
from splitft.codecs import Encoded
from splitft.errors import ProtocolError, WireError
from splitft.protocol import (
    MESSAGES,
    Activations,
    AdapterUpload,
    CutGradient,
    Evaluation,
    GlobalAdapters,
    HeadGradient,
    HeldOutLoss,
    LastHidden,
    MessageSerializer,
    RoundReady,
    RoundStart,
    expect,
)
from splitft.protocol.frame import Frame
from splitft.specs import WireSpec

WIDTH = 4
EXACT = MessageSerializer(WIDTH, torch.float32, torch.float32, WireSpec(hidden="fp32", gradient="fp32"))
ROUNDED = MessageSerializer(WIDTH, torch.float32, torch.float32, WireSpec())
WITH_LABELS = dataclasses.replace(EXACT, labels_travel=True)


def _numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _adapters() -> AdapterState:
    keys = [(0, "self_attn.q_proj"), (1, "self_attn.q_proj"), (1, "mlp.up")]
    return AdapterState({key: Factors(_numbers(2, WIDTH), _numbers(3, 2)) for key in keys})


MOMENTS = {
    "1.self_attn.q_proj.A.exp_avg": _numbers(2, WIDTH),
    "1.self_attn.q_proj.A.exp_avg_sq": _numbers(2, WIDTH) ** 2,
    "1.self_attn.q_proj.A.step": torch.tensor(7.0),
}
SENT = {
    "client": "ward 3/€",
    "round": 2,
    "step": 5,
    "training": True,
    "lengths": (3, 2),
    "labelled": ((0, 2), (1, 2)),
    "hidden": _numbers(5, WIDTH),
}
SAMPLES = [
    RoundStart(round=1, cut=2),
    RoundStart(round=3, cut=2, adapters=_adapters(), moments=MOMENTS),
    RoundReady(client="a", round=1),
    RoundReady(client="a", round=1, moments=MOMENTS),
    Activations(**SENT),
    LastHidden(step=5, hidden=_numbers(3, WIDTH)),
    HeadGradient(client="a", round=2, step=5, loss=1 / 3, gradient=_numbers(3, WIDTH)),
    CutGradient(step=5, gradient=_numbers(5, WIDTH)),
    CutGradient(step=5, gradient=_numbers(5, WIDTH), loss=0.1),
    AdapterUpload(client="a", round=2, adapters=_adapters()),
    AdapterUpload(client="a", round=2, adapters=AdapterState()),
    GlobalAdapters(round=0, adapters=_adapters()),
    HeldOutLoss(step=0, loss=12.5, tokens=9),
    Evaluation(client="a", round=0, loss=0.0, tokens=0),
]
LABELLED = Activations(**SENT, labels=torch.tensor([7, 2**40, 0]))


def _flat(message) -> dict[str, object]:
    """A message as plain values and tensors by name."""
    flat: dict[str, object] = {}
    for name in type(message).model_fields:
        value = getattr(message, name)
        parts = value.tensors() if isinstance(value, AdapterState) else value
        flat.update(
            {f"{name}/{k}": v for k, v in parts.items()} if isinstance(parts, dict) else {name: parts}
        )
    return flat


def _assert_same(found, wanted, tolerance: float = 0.0):
    assert type(found) is type(wanted)
    found, wanted = _flat(found), _flat(wanted)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype
            torch.testing.assert_close(found[name], value, rtol=tolerance, atol=0)
        else:
            assert found[name] == value


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent(message):
    _assert_same(EXACT.from_bytes(EXACT.to_bytes(message)), message)


def test_token_ids_arrive_where_they_may_travel():
    _assert_same(WITH_LABELS.from_bytes(WITH_LABELS.to_bytes(LABELLED)), LABELLED)


def test_every_kind_of_message_is_sampled_here():
    assert {type(message) for message in SAMPLES} == set(MESSAGES.values())


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_rounding_without_bytes_equals_rounding_through_bytes(message):
    _assert_same(ROUNDED.rounded(message), ROUNDED.from_bytes(ROUNDED.to_bytes(message)))
    _assert_same(ROUNDED.rounded(message), message, tolerance=2**-8)


def _refused(terms: MessageSerializer, frame: Frame, *due: str) -> None:
    """The frame is refused with an error that has these words."""
    with pytest.raises(ProtocolError) as caught:
        terms.from_bytes(frame.to_bytes())
    for words in due:
        assert words in str(caught.value)


def _as(tensor: torch.Tensor, role: str, codec: str = "fp32") -> Encoded:
    """A tensor as a careless sender would announce it."""
    return Encoded(role, codec, tensor.dtype, tuple(tensor.shape), {"": tensor})


def _spoilt(message, tensors=None, without=(), terms=EXACT, codec="fp32", **fields) -> Frame:
    """The frame of a message with some parts changed or missing."""
    frame = terms.pack(message)
    kept = {name: value for name, value in frame.fields.items() if name not in without}
    changed = {
        name: _as(one, message.ROLES.get(name.partition("/")[0], "hidden"), codec)
        for name, one in (tensors or {}).items()
    }
    return Frame(
        frame.kind,
        {**kept, **fields},
        {k: v for k, v in {**frame.tensors, **changed}.items() if k not in without},
    )


LAST, HEAD = SAMPLES[5], SAMPLES[6]
UPLOAD = SAMPLES[9]
Q = "adapters/0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("frame", "due"),
    [
        (_spoilt(LAST, {"hidden": _numbers(3, 5)}), ("(3, 5)", "rows of width 4")),
        (_spoilt(LAST, {"hidden": _numbers(4)}), ("(4,)", "rows of width 4")),
        (_spoilt(LAST, {"hidden": _numbers(1, 3, 4)}), ("(1, 3, 4)", "rows of width 4")),
        (_spoilt(LAST, {"hidden": _numbers(3, 4).double()}), ("torch.float64", "agreed was torch.float32")),
        (_spoilt(LAST, {"hidden": torch.ones(3, 4).long()}), ("torch.int64", "agreed was torch.float32")),
        (_spoilt(LAST, {"hidden": torch.full((3, 4), math.nan)}), ("'hidden'", "not finite")),
        (_spoilt(HEAD, {"gradient": torch.full((3, 4), -math.inf)}), ("'gradient'", "not finite")),
        (_spoilt(HEAD, loss="big"), ("loss", "valid number")),
        (_spoilt(HEAD, step=-1), ("step", "greater than or equal to 0")),
        (_spoilt(HEAD, client=""), ("client", "at least 1")),
        (_spoilt(HEAD, client="x" * 201), ("client", "at most 200")),
        (_spoilt(HEAD, without=("gradient",)), ("gradient", "Field required")),
        (_spoilt(HEAD, without=("round",)), ("round", "Field required")),
        (_spoilt(HEAD, text="the patient"), ("text", "not permitted")),
        (_spoilt(HEAD, {"text": torch.ones(2)}), ("HeadGradient has no tensor 'text'",)),
        (_spoilt(HEAD, without=("gradient",), gradient=[1.0, 2.0]), ("gradient", "instance of Tensor")),
        (_spoilt(SAMPLES[4], lengths=[3, 3]), ("(5, 4) for 6 tokens",)),
        (_spoilt(SAMPLES[4], lengths=[]), ("lengths", "at least 1")),
        (_spoilt(SAMPLES[4], lengths=[5, 0]), ("lengths.1", "greater than or equal to 1")),
        (_spoilt(SAMPLES[4], labelled=[[0, 2]]), ("2 lengths, but 1 labelled ranges",)),
        (_spoilt(SAMPLES[4], labelled=[[0, 4], [1, 2]]), ("labelled positions [0, 4) of a sequence of 3",)),
        (_spoilt(SAMPLES[4], labelled=[[2, 2], [1, 2]]), ("labelled positions [2, 2)",)),
        (_spoilt(SAMPLES[0], cut=0), ("cut", "greater than or equal to 1")),
        (_spoilt(SAMPLES[0], moments={"1.a.A.step": 3}), ("moments", "instance of Tensor")),
        (_spoilt(UPLOAD, {f"{Q}.A": _numbers(2, 4).bfloat16()}), ("q_proj.A", "agreed was torch.float32")),
        (_spoilt(UPLOAD, {f"{Q}.A": _numbers(3, 4)}), ("are not factors of one product",)),
        (_spoilt(UPLOAD, {f"{Q}.A": torch.full((2, 4), math.nan)}), ("q_proj.A", "not finite")),
        (_spoilt(UPLOAD, without=(f"{Q}.A",)), ("block 0 self_attn.q_proj", "only factor B")),
        (_spoilt(UPLOAD, {"adapters/x": _numbers(2, 4)}), ("'x' is not the name of an adapter factor",)),
        (_spoilt(UPLOAD, {"adapters/01.q.A": _numbers(2, 4)}), ("'01.q.A' is not the name",)),
        (
            _spoilt(SAMPLES[3], {"moments/x": _numbers(2)}, codec="raw"),
            ("'x' is not the name of an optimizer's moment",),
        ),
        (
            _spoilt(SAMPLES[3], {"moments/1.q.A.ids": torch.arange(9)}, codec="raw"),
            ("ids", "agreed was torch.float32"),
        ),
        (
            _spoilt(SAMPLES[3], {"moments/1.q.A.exp_avg": _numbers(2).double()}, codec="raw"),
            ("torch.float64",),
        ),
        (Frame("Pickle", {}, {}), ("no message is called 'Pickle'", "known: RoundStart")),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else value.kind,
)
def test_what_does_not_fit_is_refused_with_what_was_due(frame, due):
    _refused(EXACT, frame, *due)


@pytest.mark.parametrize(
    "frame",
    [_spoilt(UPLOAD, {"adapters": _numbers(2, 4)}), _spoilt(HEAD, {"gradient/0.q.A": _numbers(2, 4)})],
    ids=lambda frame: frame.kind,
)
def test_a_tensor_beside_the_members_of_its_field_is_refused_in_whatever_order_they_come(frame):
    for _ in range(20):  # safetensors gives them in any order
        _refused(EXACT, frame, frame.kind)


def test_labels_that_stay_at_home_neither_leave_nor_enter():
    with pytest.raises(ProtocolError, match="labels must not leave the client"):
        EXACT.to_bytes(LABELLED)
    with pytest.raises(ProtocolError, match="labels must not leave the client"):
        EXACT.rounded(LABELLED)
    _refused(EXACT, _spoilt(LABELLED, terms=WITH_LABELS), "carries token ids, but labels stay on the clients")


@pytest.mark.parametrize(
    ("labels", "due"),
    [(torch.ones(3), "agreed was torch.int64"), (torch.ones(2).long(), "labels (2,) for 3 positions")],
)
def test_labels_that_may_travel_have_their_type_and_number(labels, due):
    _refused(WITH_LABELS, _spoilt(LABELLED, {"labels": labels}, terms=WITH_LABELS, codec="raw"), due)


def test_torn_bytes_are_a_wire_error():
    with pytest.raises(WireError, match="torn"):
        EXACT.from_bytes(EXACT.to_bytes(LAST)[:-1])


def test_expect_says_what_came_and_what_was_due():
    expect(HEAD, LastHidden, HeadGradient)
    expect(HEAD, HeadGradient, client="a", round=2, step=5)
    with pytest.raises(ProtocolError, match="received HeadGradient; expected LastHidden or CutGradient"):
        expect(HEAD, LastHidden, CutGradient)
    with pytest.raises(ProtocolError, match="received HeadGradient of step 5; expected 6"):
        expect(HEAD, HeadGradient, step=6)


def test_what_does_not_fit_is_refused_before_its_payload_is_looked_at():
    data = bytearray(_spoilt(LAST, {"hidden": _numbers(3, 5)}).to_bytes())
    data[-1] ^= 1  # a payload that nothing may read: its checksum is wrong
    with pytest.raises(ProtocolError, match="not rows of width 4"):
        EXACT.from_bytes(bytes(data))


def test_the_receiver_is_asked_about_shapes_before_there_are_numbers():
    def refuse(outline):
        assert (outline.hidden.device.type, outline.hidden.shape, outline.step) == ("meta", (3, WIDTH), 5)
        raise ProtocolError("not now")

    data = bytearray(EXACT.to_bytes(LAST))
    data[-1] ^= 1
    with pytest.raises(ProtocolError, match="not now"):
        EXACT.from_bytes(bytes(data), check=refuse)


def test_a_codec_that_was_not_agreed_is_refused_with_both_sides_versions():
    frame = dataclasses.replace(_spoilt(LAST, {"hidden": _numbers(3, 4)}, codec="int1"), sender="splitft 9.9")
    _refused(
        EXACT, frame, "codec 'int1', which this side does not know", "splitft 9.9", "frames of version 3"
    )
    rounded = _spoilt(LAST, {"hidden": _numbers(3, 4).bfloat16()}, codec="bf16")
    _refused(EXACT, rounded, "codec 'bf16'; agreed was 'fp32'")


def test_a_batch_of_more_rows_than_any_batch_has_is_refused():
    small = dataclasses.replace(EXACT, most_rows=4)
    _refused(small, EXACT.pack(SAMPLES[4]), "has 5 rows; a batch has at most 4")


def test_parts_are_those_of_the_codec():
    wrong = Encoded("hidden", "fp32", torch.float32, (3, WIDTH), {"": _numbers(3, WIDTH).bfloat16()})
    with pytest.raises(WireError, match=r"is BF16 \[3, 4\]; codec fp32 requires F32 \[3, 4\]"):
        EXACT.from_bytes(Frame("LastHidden", {"step": 5}, {"hidden": wrong}).to_bytes())
    spoilt = dataclasses.replace(EXACT.pack(LAST).tensors["hidden"], parameters={"scale": 2})
    with pytest.raises(WireError, match="has no parameter 'scale'"):
        EXACT.from_bytes(Frame("LastHidden", {"step": 5}, {"hidden": spoilt}).to_bytes())
