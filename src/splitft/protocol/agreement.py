"""The terms of a run, and the check of a frame header against them.

    FrameHeader (kind, fields, TensorEntry of each tensor) --validate_header--> type of message, or error

Roles, codecs, types, shapes and the parts of each tensor are checked here, before any memory is allocated for
the payload.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from splitft.codecs import CODECS, Codec, StoredPart, TensorEntry
from splitft.codecs import codec_of as codec_named
from splitft.errors import ProtocolError
from splitft.protocol.adapter_deltas import SAME, DeltaState, codec_parameters
from splitft.protocol.codec_state import CodecState
from splitft.protocol.control import CONTROL_MESSAGES
from splitft.protocol.frame import MAX_FRAME_BYTES, SENDER, VERSION
from splitft.protocol.frame_header import FrameHeader
from splitft.protocol.messages import MESSAGES, Message
from splitft.specs import WireSpec
from splitft.specs.codecs import kind_of
from splitft.specs.wire import AUTO
from splitft.tracking.events import Role

RAW = "raw"
"""Codec name of tensors that travel bit by bit: token ids and EXACT fields."""
EXACT = frozenset({"moments", "folded", "own"})
"""Fields that are never rounded: it would change the training, or undo the correction of a mean."""
MEMBERED = frozenset({"adapters", "moments", "folded", "own"})
"""Fields that hold several tensors, each with a name of its own."""
KINDS: dict[str, type[Message]] = {**MESSAGES, **{kind.frame_kind(): kind for kind in CONTROL_MESSAGES}}
"""Every type of message, by its name in a frame."""
TURN = "turn"
"""Parameter of a tensor whose codec remembers at both ends: the number of those before it in its stream."""
_MOMENT = re.compile(r"(0|[1-9]\d{0,5})\.[\w.]+\.[ABM]\.\w+", re.ASCII)
"""`7.self_attn.q_proj.A.exp_avg`"""


@dataclass(frozen=True)
class Agreement:
    """The terms of a run, known on client and server before the first message; equal but for `dtype`."""

    width: int
    """D, the width of the model."""
    dtype: torch.dtype
    """Type that this side computes hidden states and gradients in."""
    adapter_dtype: torch.dtype
    """Type of LoRA factors."""
    wire: WireSpec
    """Codecs by role."""
    labels_travel: bool = False
    """True if token ids may be sent at all (`labels: server`)."""
    most_rows: int = 2**20
    """Most real tokens of a batch."""
    other_types: frozenset[torch.dtype] = frozenset()
    """Types besides `dtype` that the other side may compute hidden states and gradients in
    (`model.dtype: auto`); the frame says which, and this side decodes to its own."""
    feedback: bool = False
    """True if a client adds the rounding error of its last upload of factors to the next."""

    def codec(self, role: Role, field: str) -> str:
        """Return the name of the codec for a field of a message."""
        return RAW if field in EXACT or role == "label" else self.codec_of(role).name

    def codec_of(self, role: Role) -> Codec:
        """Return the codec of a role. Raises ProtocolError while none is chosen."""
        text: str = getattr(self.wire, role)
        if text == AUTO:
            raise ProtocolError(f"no codec is chosen for {role} yet; give wire.{role}, or let a run choose")
        return codec_named(text)

    def type_of(self, role: Role) -> torch.dtype:
        """Return the type that both sides compute in."""
        return {"label": torch.int64, "adapter": self.adapter_dtype}.get(role, self.dtype)

    def in_turn(self, role: Role, field: str) -> bool:
        """Return whether the two ends must have coded the same tensors before one of this field."""
        codec = self.codec(role, field)
        return codec in CODECS and role != "adapter" and kind_of(codec).memory == "both"

    def delta_state(self, state: CodecState) -> DeltaState:
        """Return the factors that both ends hold, with the settings of this run."""
        state.adapters.exact = kind_of(self.wire.adapter).exact_bytes >= self.adapter_dtype.itemsize
        state.adapters.feedback = self.feedback
        return state.adapters

    def validate_header(self, header: FrameHeader, state: CodecState) -> type[Message]:
        """Return the type of message. Raises ProtocolError unless every tensor is as agreed."""
        kind = KINDS.get(header.kind)
        if kind is None:
            raise ProtocolError(
                f"no message is called {header.kind!r}; known: {', '.join(KINDS)} ({_versions(header)})"
            )
        for name, entry in header.entries.items():
            field, _, key = name.partition("/")
            if field not in kind.ROLES or field in header.fields or bool(key) != (field in MEMBERED):
                raise ProtocolError(f"{header.kind} has no tensor {name!r}")
            self._validate_entry(header, kind.ROLES[field], name, entry)
            if field == "adapters":
                self.delta_state(state).base_of(key, entry)
        return kind

    def _validate_entry(self, header: FrameHeader, role: Role, name: str, entry: TensorEntry) -> None:
        """Raise ProtocolError unless a tensor has the role, codec, type, shape and parts agreed on."""
        kind = header.kind
        field, _, key = name.partition("/")
        # role and codec
        if role == "label" and not self.labels_travel:
            raise ProtocolError(f"{kind} carries token ids, but labels stay on the clients in this run")
        if entry.role != role:
            raise ProtocolError(f"{kind}: the role of {name} is {entry.role}; expected {role}")
        codec = self.codec(role, field)
        if entry.codec != codec and not (field == "adapters" and entry.codec == SAME):
            unknown = "" if entry.codec in (*CODECS, RAW) else ", which this side does not know"
            raise ProtocolError(
                f"{kind}: {name} comes in codec {entry.codec!r}{unknown}; agreed was {codec!r} "
                f"({_versions(header)})"
            )
        # type and shape
        types = {self.type_of(role), *(self.other_types if role in ("hidden", "gradient") else ())}
        if field == "moments":
            if not _MOMENT.fullmatch(key):
                raise ProtocolError(f"{kind}: {key!r} is not the name of an optimizer's moment")
            types |= set() if entry.shape else {torch.float32}  # the count of steps
        if entry.dtype not in types:
            raise ProtocolError(f"{kind}: {name} comes as {entry.dtype}; agreed was {self.type_of(role)}")
        if role in ("hidden", "gradient") and (len(entry.shape) != 2 or entry.shape[1] != self.width):
            raise ProtocolError(f"{kind}: {name} is {entry.shape}, not rows of width {self.width}")
        if role != "adapter" and entry.shape and entry.shape[0] > self.most_rows:
            raise ProtocolError(
                f"{kind}: {name} has {entry.shape[0]} rows; a batch has at most {self.most_rows}"
            )
        if math.prod(entry.shape) > MAX_FRAME_BYTES:
            raise ProtocolError(f"{kind}: {name} is {entry.shape}, larger than any frame")
        # parts
        layout = {"": StoredPart(entry.dtype, entry.shape)}
        if entry.codec == SAME:
            layout = {}
        elif codec != RAW:
            own = codec_parameters(entry.parameters) if field == "adapters" else dict(entry.parameters)
            if self.in_turn(role, field):
                own.pop(TURN, None)
            layout = self.codec_of(role).layout(as_stored(role, codec, entry.shape), own)
        entry.check(name, layout)


def as_stored(role: Role, codec: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in which a codec is given a tensor: some take a factor as a single row."""
    return (1, math.prod(shape)) if role == "adapter" and kind_of(codec).flattens_adapters else shape


def _versions(header: FrameHeader) -> str:
    return f"it came from {header.sender}; this side is {SENDER}, frames of version {VERSION}"
