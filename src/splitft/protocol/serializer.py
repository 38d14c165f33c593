"""Messages to frames and back, under the terms of a run.

    send       Message --pack--> Frame --to_bytes--> bytes
    receive    bytes --open_frame--> UnreadFrame --outline--> message of shapes --read, fill--> Message

Hidden states and gradients are encoded on their device and decoded on the receiver's, where that makes the
copy smaller (`codecs.codec`). What is in a frame is on the CPU.

A received message is checked before its payload is read: its header against the terms, and its own rules on
an outline, whose tensors have a type and a shape but no memory (torch's device `meta`). So nothing is
allocated for an invalid message. The numbers are then decoded and must be finite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pydantic import ValidationError

from splitft.adapters.state import CPU, AdapterState
from splitft.codecs import CodecContext, Encoded, TensorEntry, place_to_decode, place_to_encode
from splitft.errors import AdapterError, ProtocolError, WireError
from splitft.protocol.adapter_deltas import Origin
from splitft.protocol.agreement import RAW, TURN, Agreement, as_stored
from splitft.protocol.codec_state import CodecState
from splitft.protocol.frame import MAX_FRAME_BYTES, Frame, open_frame
from splitft.protocol.frame_header import FrameHeader
from splitft.protocol.messages import Message
from splitft.tracking.events import Role

Check = Callable[[Message], None]
"""Raises ProtocolError unless a message may come now; its tensors have shapes, but no numbers yet."""
Place = Callable[[Message], torch.device]
"""Returns the device on which the receiver of such a message, without numbers yet, computes with them."""


def always(device: torch.device) -> Place:
    """Return the place of a receiver with one device."""
    return lambda message: device


ON_THE_CPU = always(CPU)


@dataclass(frozen=True)
class ReceivedMessage:
    """A checked message, and the size of the payload of each tensor, in bytes."""

    message: Message
    payload_bytes: Mapping[str, int]


@dataclass(frozen=True)
class MessageSerializer(Agreement):
    """Writes and reads messages under an agreement.

    `state` is the memory of codecs at this end of the client's connection; without one, codecs start anew.
    """

    def rounded(self, message: Message) -> Message:
        """Return the message as the other side receives it, without passing through bytes."""
        return self.unpack(self.pack(message))

    def to_bytes(self, message: Message, state: CodecState | None = None) -> bytes:
        """Return the message as it travels. Raises ProtocolError if it may not be sent."""
        return self.pack(message, state).to_bytes()

    def from_bytes(
        self,
        data: bytes,
        limit: int = MAX_FRAME_BYTES,
        check: Check | None = None,
        state: CodecState | None = None,
        place: Place = ON_THE_CPU,
    ) -> Message:
        """Return the message of `receive`."""
        return self.receive(data, limit, check, state, place).message

    def receive(
        self,
        data: bytes,
        limit: int = MAX_FRAME_BYTES,
        check: Check | None = None,
        state: CodecState | None = None,
        place: Place = ON_THE_CPU,
    ) -> ReceivedMessage:
        """Read and check a message from the other side. Raises WireError or ProtocolError.

        `check` is called with the outline, before any payload is read. Tensors are on the CPU, or on the
        device of `place` if decoding there makes a smaller copy.
        """
        state = CodecState() if state is None else state
        unread = open_frame(data, limit)
        outline = self._outline(unread, state)
        if check is not None:
            check(outline)
        filled = self._filled(outline, unread.read(), state, place(outline))
        return ReceivedMessage(filled, unread.payload_bytes)

    def pack(self, message: Message, state: CodecState | None = None) -> Frame:
        """Return the message with its tensors encoded. Raises ProtocolError if it may not be sent."""
        fields: dict[str, Any] = {}
        tensors: dict[str, Encoded] = {}
        kind = message.frame_kind()
        state = CodecState() if state is None else state
        _begin(state, type(message), vars(message))
        for name, field in type(message).model_fields.items():
            value = getattr(message, name)
            if name not in message.ROLES:
                if name not in message.LEFT_OUT or value != field.default:
                    fields[name] = value
                continue
            role = message.ROLES[name]
            context = state.context(kind, role, *_step(vars(message)))
            if isinstance(value, torch.Tensor):
                if role == "label" and not self.labels_travel:
                    raise ProtocolError("labels must not leave the client in this run")
                tensors[name] = self._encoded(role, name, value, context)
                if self.in_turn(role, name):
                    tensors[name] = _with_turn(state, kind, tensors[name])
                continue
            members = value.tensors() if isinstance(value, AdapterState) else value or {}
            for key, tensor in members.items():
                encode = partial(self._encoded, role, name, context=context)
                decode = partial(self._decoded, kind, key, context=context, device=CPU)
                tensors[f"{name}/{key}"] = (
                    self.delta_state(state).encode(_origin(kind), key, tensor, encode, decode)
                    if name == "adapters"
                    else encode(tensor)
                )
        return Frame(kind, fields, tensors)

    def unpack(self, frame: Frame, state: CodecState | None = None, place: Place = ON_THE_CPU) -> Message:
        """Return the message of a frame, checked. Raises ProtocolError or WireError."""
        state = CodecState() if state is None else state
        outline = self._outline(frame.header, state)
        return self._filled(outline, frame, state, place(outline))

    # ----------------------------------------------------------------------------------------------

    def _outline(self, header: FrameHeader, state: CodecState) -> Message:
        """Return the message with shapes instead of numbers, checked against terms and its own rules."""
        kind = self.validate_header(header, state)
        shapes = {
            name: torch.empty(entry.shape, dtype=self._own_type(entry), device="meta")
            for name, entry in header.entries.items()
        }
        try:
            values = {**header.fields, **_by_field(shapes)}
            if "adapters" in kind.model_fields:
                values.setdefault("adapters", AdapterState())
            return kind.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "message"
            raise ProtocolError(f"{kind.frame_kind()}: {place}: {first['msg']}") from error
        except AdapterError as error:
            raise ProtocolError(f"{kind.frame_kind()}: {error}") from error

    def _filled(self, outline: Message, frame: Frame, state: CodecState, device: torch.device) -> Message:
        """Return the message of an outline with its numbers, which are decoded in this order."""
        _begin(state, type(outline), frame.fields)
        step = _step(frame.fields)
        numbers = {}
        for name, encoded in frame.tensors.items():
            field, _, key = name.partition("/")
            if self.in_turn(outline.ROLES[field], field):
                _check_turn(state, frame.kind, encoded)
            context = state.context(frame.kind, encoded.role, *step)
            decode = partial(self._decoded, frame.kind, name, context=context, device=device)
            numbers[name] = (
                self.delta_state(state).decode(_origin(frame.kind), key, encoded, decode)
                if field == "adapters"
                else decode(encoded)
            )
        return outline.model_copy(update=_by_field(numbers))

    def _encoded(self, role: Role, field: str, tensor: torch.Tensor, context: CodecContext) -> Encoded:
        """Return a tensor as its codec writes it. Raises ProtocolError for numbers that are not finite."""
        name, shape = self.codec(role, field), tuple(tensor.shape)
        if name == RAW:
            return Encoded(role, RAW, tensor.dtype, shape, {"": tensor.detach().cpu()})
        codec = self.codec_of(role)
        placed = place_to_encode(codec, tensor.detach().reshape(as_stored(role, name, shape)), context)
        if not bool(torch.isfinite(placed).all()):
            raise ProtocolError(f"{field} has numbers that are not finite and cannot be sent")
        encoded = codec.encode(placed, context).to(CPU)
        return replace(encoded, dtype=self.type_of(role), shape=shape)

    def _own_type(self, sent: Encoded | TensorEntry) -> torch.dtype:
        """Return the type of a tensor on this side: the sender's, unless each side may have its own."""
        role: Role = sent.role  # type: ignore[assignment]  # validated in the header
        return self.type_of(role) if sent.dtype in self.other_types and role != "adapter" else sent.dtype

    def _decoded(
        self, kind: str, name: str, encoded: Encoded, context: CodecContext, device: torch.device
    ) -> torch.Tensor:
        """Return the numbers of a tensor. Raises ProtocolError unless all of them are finite."""
        if encoded.codec == RAW:
            tensor = encoded.parts[""]
        else:
            role: Role = encoded.role  # type: ignore[assignment]  # validated in the header
            codec, dtype = self.codec_of(role), self._own_type(encoded)
            where = CPU if role == "adapter" else device  # adapters between parties are of no device
            encoded = place_to_decode(codec, encoded, dtype, where)
            stored = replace(encoded, shape=as_stored(role, encoded.codec, encoded.shape))
            tensor = codec.decode(stored, dtype, context).reshape(encoded.shape)
        scales = [part for part in encoded.parts.values() if part is not tensor and part.is_floating_point()]
        numbers = [one for one in (tensor, *scales) if one.is_floating_point()]
        # torch has no isfinite for float8
        finite = [torch.isfinite(one.float() if one.dtype.itemsize == 1 else one).all() for one in numbers]
        if finite and not bool(torch.stack(finite).all()):  # one wait for the device
            raise ProtocolError(f"{kind}: tensor {name!r} has numbers that are not finite")
        return tensor


def _by_field(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Gather the tensors of a frame by the field of their message. Raises AdapterError."""
    values: dict[str, Any] = {}
    members: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        field, _, key = name.partition("/")
        if key:
            members.setdefault(field, {})[key] = tensor
        else:
            values[field] = tensor
    for field, named in members.items():
        values[field] = named if field == "moments" else AdapterState.from_tensors(named)
    return values


def _origin(kind: str) -> Origin:
    """Return whose factors a message carries."""
    return "own" if kind == "AdapterUpload" else "global"


def _begin(state: CodecState, kind: type[Message], values: Mapping[str, Any]) -> None:
    """Begin what a message of this type and with these fields begins: codecs anew, a round, a batch."""
    if kind.RESTARTS:
        state.restart()
    if "cut" in values:
        state.begin_round(values["cut"])
    if "labelled" in values:
        ids, lengths, labelled = values.get("examples", ()), values["lengths"], values["labelled"]
        counts = [stop - start for start, stop in labelled]
        examples = list(zip(ids, lengths, counts, strict=True)) if ids else []
        state.begin_batch(values["training"], examples, values.get("micro_batch", 0))


def _with_turn(state: CodecState, kind: str, encoded: Encoded) -> Encoded:
    """Count a tensor, and return it with the number of those before it in its stream."""
    turn = state.coded(kind)
    state.count(kind)
    return replace(encoded, parameters={**encoded.parameters, TURN: turn})


def _check_turn(state: CodecState, kind: str, encoded: Encoded) -> None:
    """Count a tensor. Raises WireError if the sender has coded another number of them before it."""
    here, there = state.coded(kind), encoded.parameters.get(TURN, state.coded(kind))
    if here != there:
        raise WireError(
            f"{kind}: the codec {encoded.codec} goes on from {there} tensors at the sender, {here} here: one "
            "side has begun anew; both do when the site joins again, with the next round"
        )
    state.count(kind)


def _step(values: Mapping[str, Any]) -> tuple[int, int]:
    """Return step and micro-batch of a message, 0 if it has none."""
    return int(values.get("step", 0)), int(values.get("micro_batch", 0))
