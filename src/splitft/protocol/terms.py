"""What both sides agreed on, and so how a message becomes a frame, and a frame a checked message.

Message --pack--> Frame --bytes--> Frame --unpack--> Message        every tensor by its role's codec
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError

from splitft.adapters import AdapterState
from splitft.adapters.optimizer import Moments
from splitft.errors import AdapterError, ProtocolError
from splitft.protocol.messages import MESSAGES, Message
from splitft.specs import WireSpec
from splitft.tracking.events import Role
from splitft.wire import CODECS, MAX_FRAME_BYTES, Cast, Frame

_MOMENT = re.compile(r"(0|[1-9]\d{0,5})\.[\w.]+\.[AB]\.\w+", re.ASCII)
"""`7.self_attn.q_proj.A.exp_avg`"""


@dataclass(frozen=True)
class Terms:
    """What client and server agreed on before the first message."""

    width: int
    """D."""
    dtype: torch.dtype
    """Type that hidden states and gradients are computed in."""
    adapter_dtype: torch.dtype
    """Type that factors are kept in."""
    wire: WireSpec
    """Codecs by role."""
    labels_travel: bool = False
    """Whether token ids may travel at all (`labels: server`)."""

    def rounded(self, message: Message) -> Message:
        """The message as the other side will see it, without passing through bytes."""
        return self._unpack(self._pack(message))

    def to_bytes(self, message: Message) -> bytes:
        """The message as it travels. Raises ProtocolError if it may not."""
        return self._pack(message).to_bytes()

    def from_bytes(self, data: bytes, limit: int = MAX_FRAME_BYTES) -> Message:
        """A message from the other side, checked. Raises WireError or ProtocolError saying what is wrong."""
        return self._unpack(Frame.from_bytes(data, limit))

    def payload_bytes(self, message: Message) -> dict[Role, int]:
        """Bytes of the message's tensors on the wire, by role."""
        sizes: dict[Role, int] = {}
        for name, tensor in self._pack(message).tensors.items():
            role = message.ROLES[name.partition("/")[0]]
            sizes[role] = sizes.get(role, 0) + tensor.numel() * tensor.dtype.itemsize
        return sizes

    def _codec(self, role: Role) -> Cast | None:
        """None for token ids, which are not numbers to round."""
        names = {"hidden": self.wire.hidden, "gradient": self.wire.gradient, "adapter": self.wire.adapter}
        return CODECS[names[role]] if role in names else None

    def _pack(self, message: Message) -> Frame:
        kind = type(message).__name__
        fields: dict[str, Any] = {}
        tensors: dict[str, torch.Tensor] = {}
        for name in type(message).model_fields:
            value = getattr(message, name)
            if name not in message.ROLES:
                fields[name] = value
                continue
            role = message.ROLES[name]
            codec = self._codec(role)
            if isinstance(value, torch.Tensor):
                if role == "label" and not self.labels_travel:
                    raise ProtocolError("labels were about to leave the client, whose labels stay at home")
                tensors[name] = value if codec is None else codec.encode(value)
            elif isinstance(value, AdapterState):
                for key, tensor in value.tensors().items():
                    tensors[f"{name}/{key}"] = tensor if codec is None else codec.encode(tensor)
            elif value is not None:  # moments travel as they are: rounding them would change the training
                tensors.update((f"{name}/{key}", tensor) for key, tensor in value.items())
        return Frame(kind, fields, tensors)

    def _unpack(self, frame: Frame) -> Message:
        kind = MESSAGES.get(frame.kind)
        if kind is None:
            raise ProtocolError(f"no message is called {frame.kind!r}; known: {', '.join(MESSAGES)}")
        values: dict[str, Any] = dict(frame.fields)
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in frame.tensors.items():
            field, _, key = name.partition("/")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ProtocolError(f"{frame.kind}: tensor {name!r} has numbers that are not finite")
            if field not in kind.ROLES or field in values or (not key and field in parts):
                raise ProtocolError(f"{frame.kind} has no tensor {name!r}")
            if key:
                parts.setdefault(field, {})[key] = tensor
            else:
                values[field] = self._tensor(frame.kind, name, tensor, kind.ROLES[field])
        try:
            for field, members in parts.items():
                values[field] = self._members(frame.kind, field, members)
            if "adapters" in kind.model_fields:
                values.setdefault("adapters", AdapterState())
            return kind.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "the whole"
            raise ProtocolError(f"{frame.kind}: {place}: {first['msg']}") from error
        except AdapterError as error:
            raise ProtocolError(f"{frame.kind}: {error}") from error

    def _tensor(self, kind: str, name: str, tensor: torch.Tensor, role: Role) -> torch.Tensor:
        codec = self._codec(role)
        if codec is None:
            if not self.labels_travel:
                raise ProtocolError(f"{kind} carries token ids, but labels stay on the clients in this run")
            if tensor.dtype != torch.int64:
                raise ProtocolError(f"{kind}: {name} are {tensor.dtype}, token ids are int64")
            return tensor
        if tensor.dtype != codec.dtype:
            raise ProtocolError(f"{kind}: {name} comes as {tensor.dtype}; agreed was {codec.dtype}")
        if tensor.dim() != 2 or tensor.shape[1] != self.width:
            raise ProtocolError(f"{kind}: {name} is {tuple(tensor.shape)}, not rows of width {self.width}")
        return codec.decode(tensor, self.dtype)

    def _members(self, kind: str, field: str, members: Mapping[str, torch.Tensor]) -> AdapterState | Moments:
        if field == "moments":
            return self._moments(kind, members)
        codec = CODECS[self.wire.adapter]
        for name, tensor in members.items():
            if tensor.dtype != codec.dtype:
                raise ProtocolError(f"{kind}: {name} comes as {tensor.dtype}; agreed was {codec.dtype}")
        decoded = {name: codec.decode(tensor, self.adapter_dtype) for name, tensor in members.items()}
        return AdapterState.from_tensors(decoded)

    def _moments(self, kind: str, members: Mapping[str, torch.Tensor]) -> Moments:
        """Moments by the names that `LocalOptimizer` gives them, in the type of the factors."""
        for name, tensor in members.items():
            if not _MOMENT.fullmatch(name):
                raise ProtocolError(f"{kind}: {name!r} is not the name of an optimizer's moment")
            due = (self.adapter_dtype,) if tensor.dim() else (torch.float32, self.adapter_dtype)
            if tensor.dtype not in due:
                raise ProtocolError(f"{kind}: {name} comes as {tensor.dtype}; agreed was {due[0]}")
        return dict(members)
