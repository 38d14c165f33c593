"""The conversation between a client and the server, as data.

    server                                   client
      RoundStart      cut, what is new  ---->
                                        <----  RoundReady      moments of blocks given up
   each step:
                                        <----  Activations     hidden at the cut (N, D)
      LastHidden      (M, D)            ---->                  head and loss on the client
                                        <----  HeadGradient    (M, D)
      CutGradient     (N, D)            ---->
   then:
                                        <----  AdapterUpload   factors of blocks [0, k)
      GlobalAdapters  after aggregation ---->
   evaluation:  Activations -> LastHidden for each held-out batch, then Evaluation

With `labels: server`, Activations carry the labels; CutGradient (training) or HeldOutLoss (evaluation)
answers at once. Only real tokens travel, never padding: N is the sum of the lengths; M counts positions
that carry a label. Of a sequence the server learns its length and where its labels stand.

Messages are pydantic models, so that what comes from the other side is checked field by field; `Terms`
knows what both sides agreed on, and turns messages into frames and back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from splitft.adapters import AdapterState
from splitft.adapters.optimizer import Moments
from splitft.errors import AdapterError, ProtocolError, WireError
from splitft.specs import WireSpec
from splitft.tracking.events import Role
from splitft.wire import CODECS, MAX_FRAME_BYTES, Cast, Frame

_MOMENT = re.compile(r"(0|[1-9]\d{0,5})\.[\w.]+\.[AB]\.\w+", re.ASCII)
"""`7.self_attn.q_proj.A.exp_avg`"""

Count = Annotated[int, Field(ge=0)]
Length = Annotated[int, Field(ge=1)]
Loss = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=200)]


class Message(BaseModel):
    """One message; its tensor fields are listed by role."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    ROLES: ClassVar[Mapping[str, Role]] = {}
    """Role of each field that holds tensors; the first is also charged with the frame's overhead."""

    @property
    def main_role(self) -> Role:
        """What the message is mainly about."""
        return next(iter(self.ROLES.values()), "adapter")


class RoundStart(Message):
    """Server: train a round at this cut, beginning with the adapters that you hold and these."""

    round: Length
    cut: Length
    adapters: AdapterState = AdapterState()
    """Global factors of blocks that the client gains with this cut."""
    moments: dict[str, torch.Tensor] = {}
    """Optimizer moments of those blocks, when kept."""
    ROLES = {"adapters": "adapter", "moments": "adapter"}


class RoundReady(Message):
    """Client: the cut is in place."""

    client: Name
    round: Length
    moments: dict[str, torch.Tensor] = {}
    """Optimizer moments of blocks given up, when kept."""
    ROLES = {"moments": "adapter"}


class Activations(Message):
    """Client: hidden states at the cut, of training or of evaluation."""

    client: Name
    round: Count
    step: Count
    training: bool
    lengths: tuple[Length, ...] = Field(min_length=1)
    """Real tokens of each sequence."""
    labelled: tuple[tuple[Count, Count], ...]
    """Positions [start, stop) of each sequence that carry a label."""
    hidden: torch.Tensor
    """(N, D)."""
    labels: torch.Tensor | None = None
    """(M,) token ids; only with `labels: server`."""
    ROLES = {"hidden": "hidden", "labels": "label"}

    @property
    def labelled_tokens(self) -> int:
        """M."""
        return sum(stop - start for start, stop in self.labelled)

    @model_validator(mode="after")
    def _sizes_agree(self) -> Activations:
        if len(self.labelled) != len(self.lengths):
            raise ValueError(f"{len(self.lengths)} lengths, but {len(self.labelled)} labelled ranges")
        for length, (start, stop) in zip(self.lengths, self.labelled, strict=True):
            if not start < stop <= length:
                raise ValueError(f"labelled positions [{start}, {stop}) of a sequence of {length}")
        if self.hidden.dim() != 2 or len(self.hidden) != sum(self.lengths):
            raise ValueError(f"hidden {tuple(self.hidden.shape)} for {sum(self.lengths)} tokens")
        if self.labels is not None and self.labels.shape != (self.labelled_tokens,):
            raise ValueError(f"labels {tuple(self.labels.shape)} for {self.labelled_tokens} positions")
        return self


class LastHidden(Message):
    """Server: hidden states after the last block at the labelled positions."""

    step: Count
    hidden: torch.Tensor
    """(M, D)."""
    ROLES = {"hidden": "hidden"}


class HeadGradient(Message):
    """Client: gradient of its mean loss at LastHidden."""

    client: Name
    round: Count
    step: Count
    loss: Loss
    """Mean loss of the batch in nats, for the record."""
    gradient: torch.Tensor
    """(M, D)."""
    ROLES = {"gradient": "gradient"}


class CutGradient(Message):
    """Server: gradient of the client's mean loss at the cut."""

    step: Count
    gradient: torch.Tensor
    """(N, D)."""
    loss: Loss | None = None
    """Mean loss in nats, with `labels: server`."""
    ROLES = {"gradient": "gradient"}


class AdapterUpload(Message):
    """Client: its blocks' factors after the round."""

    client: Name
    round: Length
    adapters: AdapterState
    ROLES = {"adapters": "adapter"}


class GlobalAdapters(Message):
    """Server: the aggregated factors of the client's blocks."""

    round: Count
    adapters: AdapterState
    ROLES = {"adapters": "adapter"}


class HeldOutLoss(Message):
    """Server, with `labels: server`: summed loss of one held-out batch."""

    step: Count
    loss: Loss
    tokens: Length


class Evaluation(Message):
    """Client: loss of the global adapters on its held-out text."""

    client: Name
    round: Count
    loss: Loss
    """Sum over labelled tokens, in nats."""
    tokens: Count
    """Labelled tokens."""


MESSAGES: dict[str, type[Message]] = {
    kind.__name__: kind
    for kind in (
        RoundStart, RoundReady, Activations, LastHidden, HeadGradient, CutGradient, AdapterUpload,
        GlobalAdapters, HeldOutLoss, Evaluation,
    )
}  # fmt: skip
"""Every message that may travel, by name."""


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


def expect(message: Message, *kinds: type[Message], **fields: object) -> None:
    """Raise ProtocolError unless the message is of one of these kinds and has these values.

    `expect(message, HeadGradient, client="a", round=2, step=7)` is how each side says what may follow.
    """
    if not isinstance(message, kinds):
        awaited = " or ".join(kind.__name__ for kind in kinds)
        raise ProtocolError(f"{type(message).__name__} came where {awaited} was due")
    for name, wanted in fields.items():
        found = getattr(message, name)
        if found != wanted:
            raise ProtocolError(f"{type(message).__name__} of {name} {found!r} came, {wanted!r} was due")


__all__ = [*MESSAGES, "MESSAGES", "Message", "Terms", "WireError", "expect"]
