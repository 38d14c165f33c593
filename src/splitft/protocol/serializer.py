"""How a message becomes a frame by what was agreed, and a frame a checked message.

    Message --pack--> Frame --bytes--> UnreadFrame --------> Frame --unpack--> Message
                                       |                                     every tensor by its role's codec
                                       + a message of shapes alone: what the payload may be is settled here

A message from the other side is checked twice by the same rules: first with tensors that have a type and a
shape but no memory (torch's device `meta`), so that what does not fit is refused before anything is
allocated for it, then with its numbers, which must be finite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import ValidationError

from splitft.adapters import AdapterState
from splitft.adapters.optimizer import Moments
from splitft.codecs import CodecContext, Encoded
from splitft.errors import AdapterError, ProtocolError
from splitft.protocol.adapter_deltas import Way
from splitft.protocol.agreement import RAW, Agreement, as_stored
from splitft.protocol.codec_state import CodecState
from splitft.protocol.frame import MAX_FRAME_BYTES, Frame, UnreadFrame, open_frame
from splitft.protocol.messages import Message
from splitft.tracking.events import Role

Check = Callable[[Message], None]
"""Raises ProtocolError unless the message may come now; its tensors have shapes, but no numbers yet."""


@dataclass(frozen=True)
class MessageSerializer(Agreement):
    """How messages travel under an agreement."""

    def rounded(self, message: Message) -> Message:
        """The message as the other side will see it, without passing through bytes."""
        return self.unpack(self.pack(message))

    def to_bytes(self, message: Message, streams: CodecState | None = None) -> bytes:
        """The message as it travels. Raises ProtocolError if it may not.

        `streams` is what this end of the client's line remembers, for codecs that learn.
        """
        return self.pack(message, streams).to_bytes()

    def from_bytes(
        self,
        data: bytes,
        limit: int = MAX_FRAME_BYTES,
        check: Check | None = None,
        streams: CodecState | None = None,
    ) -> Message:
        """A message from the other side, checked. Raises WireError or ProtocolError saying what is wrong.

        Before any payload is read, `check` is asked with the message of shapes.
        """
        announced = open_frame(data, limit)
        streams = CodecState() if streams is None else streams
        outline = self._outline(announced, streams)
        if check is not None:
            check(outline)
        return self.unpack(announced.read(), streams)

    def pack(self, message: Message, streams: CodecState | None = None) -> Frame:
        """The message with its tensors as the codecs write them. Raises ProtocolError if it may not."""
        fields: dict[str, Any] = {}
        tensors: dict[str, Encoded] = {}
        kind = message.frame_kind()
        streams = CodecState() if streams is None else streams
        _begin(streams, vars(message))
        for name in type(message).model_fields:
            value = getattr(message, name)
            if name not in message.ROLES:
                default = type(message).model_fields[name].default
                if name not in message.LEFT_OUT or value != default:
                    fields[name] = value
                continue
            role = message.ROLES[name]
            passage = streams.passage(kind, role, *_number(vars(message)))
            if isinstance(value, torch.Tensor):
                if role == "label" and not self.labels_travel:
                    raise ProtocolError("labels were about to leave the client, whose labels stay at home")
                tensors[name] = self._encoded(role, name, value, passage)
            else:
                members = value.tensors() if isinstance(value, AdapterState) else value or {}
                for key, tensor in members.items():
                    tensors[f"{name}/{key}"] = (
                        self._changed(kind, key, tensor, passage, streams)
                        if name == "adapters"
                        else self._encoded(role, name, tensor, passage)
                    )
        return Frame(kind, fields, tensors)

    def unpack(self, frame: Frame, streams: CodecState | None = None) -> Message:
        """The message of a frame whose tensors are there. Raises ProtocolError saying what is wrong."""
        entries = {name: encoded.entry for name, encoded in frame.tensors.items()}
        streams = CodecState() if streams is None else streams
        kind = self.validate_header(frame.kind, frame.fields, entries, frame.sender, streams)
        _begin(streams, frame.fields)
        number = _number(frame.fields)
        decoded = {
            name: self._arrived(kind, name, one, streams.passage(frame.kind, one.role, *number), streams)
            for name, one in frame.tensors.items()
        }
        return _message(kind, frame.fields, decoded)

    # ----------------------------------------------------------------------------------------------

    def _encoded(self, role: Role, field: str, tensor: torch.Tensor, passage: CodecContext) -> Encoded:
        codec, shape = self.codec(role, field), tuple(tensor.shape)
        if codec == RAW:
            return Encoded(role, RAW, tensor.dtype, shape, {"": tensor.detach()})
        if not bool(torch.isfinite(tensor).all()):
            raise ProtocolError(f"{field} has numbers that are not finite and cannot be sent")
        stored = as_stored(role, codec, shape)
        encoded = self.codec_of(role).encode(tensor.reshape(stored), passage)
        return replace(encoded, dtype=self.type_of(role), shape=shape)

    def _changed(
        self, kind: str, key: str, tensor: torch.Tensor, passage: CodecContext, streams: CodecState
    ) -> Encoded:
        """A factor as what changed since the other side last saw it."""
        return self.holdings(streams).sent(
            _way(kind),
            key,
            tensor,
            lambda one: self._encoded("adapter", "adapters", one, passage),
            lambda one: self._decoded(kind, key, one, passage),
        )

    def _arrived(
        self, kind: type[Message], name: str, encoded: Encoded, passage: CodecContext, streams: CodecState
    ) -> torch.Tensor:
        """A tensor's numbers; a factor's may be what changed."""
        field, _, key = name.partition("/")
        if field != "adapters":
            return self._decoded(kind.frame_kind(), name, encoded, passage)
        return self.holdings(streams).received(
            _way(kind.frame_kind()),
            key,
            encoded,
            lambda one: self._decoded(kind.frame_kind(), name, one, passage),
        )

    def _outline(self, announced: UnreadFrame, streams: CodecState) -> Message:
        """The message with shapes alone, checked against what was agreed."""
        entries = announced.entries
        kind = self.validate_header(announced.kind, announced.fields, entries, announced.sender, streams)
        shapes = {
            name: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            for name, entry in entries.items()
        }
        return _message(kind, announced.fields, shapes)

    def _decoded(self, kind: str, name: str, encoded: Encoded, passage: CodecContext) -> torch.Tensor:
        """The tensor's numbers, all of them finite."""
        if encoded.codec == RAW:
            tensor = encoded.parts[""]
        else:
            role: Role = encoded.role  # type: ignore[assignment]  # admitted
            stored = replace(encoded, shape=as_stored(role, encoded.codec, encoded.shape))
            decoded = self.codec_of(role).decode(stored, encoded.dtype, passage)
            tensor = decoded.reshape(encoded.shape)
        scales = [part for part in encoded.parts.values() if part is not tensor and part.is_floating_point()]
        for one in (tensor, *scales):
            wide = one.float() if one.dtype.itemsize == 1 else one  # torch has no isfinite for float8
            if one.is_floating_point() and not bool(torch.isfinite(wide).all()):
                raise ProtocolError(f"{kind}: tensor {name!r} has numbers that are not finite")
        return tensor


def _message(kind: type[Message], fields: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Message:
    """A message of a frame's plain fields and tensors, checked by its own rules."""
    values: dict[str, Any] = dict(fields)
    parts: dict[str, Moments] = {}
    for name, tensor in tensors.items():
        field, _, key = name.partition("/")
        if key:
            parts.setdefault(field, {})[key] = tensor
        else:
            values[field] = tensor
    try:
        for field, members in parts.items():
            values[field] = members if field == "moments" else AdapterState.from_tensors(members)
        if "adapters" in kind.model_fields:
            values.setdefault("adapters", AdapterState())
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise ProtocolError(f"{kind.frame_kind()}: {place}: {first['msg']}") from error
    except AdapterError as error:
        raise ProtocolError(f"{kind.frame_kind()}: {error}") from error


def _way(kind: str) -> Way:
    """Whose factors a message brings."""
    return "own" if kind == "AdapterUpload" else "global"


def _begin(streams: CodecState, values: Mapping[str, Any]) -> None:
    """Tell this end of the line of a round that begins, and of the batch that Activations bring."""
    if "cut" in values:
        streams.at_cut(values["cut"])
    if "labelled" in values:
        names, lengths, labelled = values.get("examples", ()), values["lengths"], values["labelled"]
        counts = [stop - start for start, stop in labelled]
        examples = list(zip(names, lengths, counts, strict=True)) if names else []
        streams.begin(values["training"], examples, values.get("micro_batch", 0))


def _number(values: Mapping[str, Any]) -> tuple[int, int]:
    """The step and the micro-batch of a message that has them."""
    return int(values.get("step", 0)), int(values.get("micro_batch", 0))
