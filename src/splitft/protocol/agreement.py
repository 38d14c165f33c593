"""What client and server agreed on before the first message, and whether what is announced keeps to it.

    kind, plain fields, Entry of each tensor --admit--> the kind of message, or a ProtocolError

Nothing here has seen a payload: roles, codecs, types, shapes and the parts of each tensor are settled before
a byte is allocated for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from splitft.codecs import CODECS, Codec, StoredPart, TensorEntry
from splitft.codecs import codec_of as codec_named
from splitft.errors import ProtocolError
from splitft.protocol.adapter_deltas import SAME, DeltaState, of_codec
from splitft.protocol.codec_state import CodecState
from splitft.protocol.control import CONTROL_MESSAGES
from splitft.protocol.frame import MAX_FRAME_BYTES, SENDER, VERSION
from splitft.protocol.messages import MESSAGES, Message
from splitft.specs import WireSpec
from splitft.specs.wire import AUTO
from splitft.tracking.events import Role

RAW = "raw"
"""In place of a codec's name: bit by bit, for token ids and for moments, whose rounding would change the
training."""
FLAT = frozenset({"int8"})
"""Codecs that take a factor as one row of all its numbers."""
MEMBERED = frozenset({"adapters", "moments", "folded", "own"})
"""Fields that hold several tensors, each by a name of its own."""
KINDS: dict[str, type[Message]] = {**MESSAGES, **{kind.frame_kind(): kind for kind in CONTROL_MESSAGES}}
"""Every message that may travel, by name."""
EXACT = frozenset({"moments", "folded", "own"})
"""Those that travel as they are: rounding them would change the training, or undo what corrects a mean."""
_MOMENT = re.compile(r"(0|[1-9]\d{0,5})\.[\w.]+\.[ABM]\.\w+", re.ASCII)
"""`7.self_attn.q_proj.A.exp_avg`"""


@dataclass(frozen=True)
class Agreement:
    """What was agreed."""

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
    most_rows: int = 2**20
    """Real tokens of one batch, at most."""
    feedback: bool = False
    """Whether a client adds to its next upload of factors what rounding left out of the last."""

    def codec(self, role: Role, field: str) -> str:
        """Name of the codec that a tensor of this field travels in."""
        return RAW if field in EXACT or role == "label" else self.codec_of(role).name

    def codec_of(self, role: Role) -> Codec:
        """The codec of a role. Raises ProtocolError while none is chosen."""
        given: str = getattr(self.wire, role)
        if given == AUTO:
            raise ProtocolError(f"no codec is chosen for {role} yet; give wire.{role}, or let a run choose")
        return codec_named(given)

    def type_of(self, role: Role) -> torch.dtype:
        """Type that both sides compute in."""
        return {"label": torch.int64, "adapter": self.adapter_dtype}.get(role, self.dtype)

    def holdings(self, streams: CodecState) -> DeltaState:
        """What this end knows that the other holds of the client's factors."""
        exact = {"fp64": torch.float64, "fp32": torch.float32}.get(self.wire.adapter)
        streams.adapters.exact = exact is not None and exact.itemsize >= self.adapter_dtype.itemsize
        streams.adapters.feedback = self.feedback
        return streams.adapters

    def validate_header(
        self,
        name: str,
        fields: Mapping[str, Any],
        entries: Mapping[str, TensorEntry],
        sender: str,
        streams: CodecState,
    ) -> type[Message]:
        """The kind of message, if all its tensors are announced as agreed. Raises ProtocolError if not."""
        kind = KINDS.get(name)
        if kind is None:
            raise ProtocolError(
                f"no message is called {name!r}; known: {', '.join(KINDS)} "
                f"(it came from {sender}; this side is {_here()})"
            )
        for tensor, entry in entries.items():
            field, _, key = tensor.partition("/")
            if field not in kind.ROLES or field in fields or bool(key) != (field in MEMBERED):
                raise ProtocolError(f"{name} has no tensor {tensor!r}")
            self._admit_entry(name, kind.ROLES[field], tensor, entry, sender)
            if field == "adapters":
                self.holdings(streams).base_of(key, entry.dtype, entry.shape, entry.codec, entry.parameters)
        return kind

    def _admit_entry(self, kind: str, role: Role, name: str, entry: TensorEntry, sender: str) -> None:
        """Raise ProtocolError unless the tensor is announced as agreed."""
        field, _, key = name.partition("/")
        if role == "label" and not self.labels_travel:
            raise ProtocolError(f"{kind} carries token ids, but labels stay on the clients in this run")
        if entry.role != role:
            raise ProtocolError(f"{kind}: {name} comes as {entry.role}; it is {role}")
        codec = self.codec(role, field)
        if entry.codec != codec and not (field == "adapters" and entry.codec == SAME):
            known = "" if entry.codec in (*CODECS, RAW) else ", which this side does not know"
            raise ProtocolError(
                f"{kind}: {name} comes in codec {entry.codec!r}{known}; agreed was {codec!r} "
                f"(it came from {sender}; this side is {_here()})"
            )
        due = {self.type_of(role)}
        if field == "moments":
            if not _MOMENT.fullmatch(key):
                raise ProtocolError(f"{kind}: {key!r} is not the name of an optimizer's moment")
            due |= set() if entry.shape else {torch.float32}  # the count of steps
        if entry.dtype not in due:
            raise ProtocolError(f"{kind}: {name} comes as {entry.dtype}; agreed was {self.type_of(role)}")
        if role in ("hidden", "gradient") and (len(entry.shape) != 2 or entry.shape[1] != self.width):
            raise ProtocolError(f"{kind}: {name} is {entry.shape}, not rows of width {self.width}")
        if role != "adapter" and entry.shape and entry.shape[0] > self.most_rows:
            raise ProtocolError(
                f"{kind}: {name} has {entry.shape[0]} rows; a batch has at most {self.most_rows}"
            )
        if math.prod(entry.shape) > MAX_FRAME_BYTES:
            raise ProtocolError(f"{kind}: {name} is {entry.shape}, larger than any frame")
        layout = {"": StoredPart(entry.dtype, entry.shape)}
        if entry.codec == SAME:
            layout = {}
        elif codec != RAW:
            stored = as_stored(role, codec, entry.shape)
            own = of_codec(entry.parameters) if field == "adapters" else entry.parameters
            layout = self.codec_of(role).layout(stored, own)
        entry.check(name, layout)


def as_stored(role: Role, codec: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a codec is given: factors are narrow, so groups run over their rows."""
    return (1, math.prod(shape)) if role == "adapter" and codec in FLAT else shape


def _here() -> str:
    """This side's versions."""
    return f"{SENDER}, frames of version {VERSION}"
