"""The messages of training and evaluation between a client and the server.

    server                                   client
      RoundStart      cut, what is new  ---->
                                        <----  RoundReady      moments of blocks given up
   each step:
                                        <----  Activations     hidden at the cut (N, D)
      LastHidden      (M, D)            ---->                  head and loss on the client
                                        <----  HeadGradient    (M, D)
      CutGradient     (N, D)            ---->
   (for each micro-batch of the step; several may be in flight at once)
   then:
                                        <----  AdapterUpload   factors of blocks [0, k)
      GlobalAdapters  after aggregation ---->
   evaluation:  Activations -> LastHidden for each held-out batch, then Evaluation

With `labels: server`, Activations carry the labels; CutGradient (training) or HeldOutLoss (evaluation)
is the only reply. Only real tokens are sent, never padding: N is the sum of the lengths, M the number of
positions with a label. The server learns the length of each sequence and which positions have a label.

Messages are pydantic models, so that every field of a received message is checked. `MessageSerializer` turns
messages into frames and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, ClassVar, Literal, TypeVar, overload

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from splitft.adapters import AdapterState
from splitft.errors import ProtocolError
from splitft.foreign_text import printable
from splitft.specs.training import MOST_MICRO_BATCHES
from splitft.tracking.events import Role

Count = Annotated[int, Field(ge=0)]
Length = Annotated[int, Field(ge=1)]
Loss = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Words = Annotated[str, AfterValidator(printable)]
"""A text for people: control characters become visible escapes, and the length is bounded."""
ErrorName = Annotated[str, Field(min_length=1), AfterValidator(partial(printable, longest=200))]
MicroBatchNumber = Annotated[int, Field(ge=0, lt=MOST_MICRO_BATCHES)]
Seconds = dict[Literal["client_forward", "head", "client_backward"], Annotated[float, Field(ge=0, le=1e6)]]
"""Seconds that a client has computed since its last message of the round, by leg."""


class Message(BaseModel):
    """Base class of all messages."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    ROLES: ClassVar[Mapping[str, Role]] = {}
    """Role of each field that holds tensors. The frame's overhead counts towards the first role."""
    LEFT_OUT: ClassVar[frozenset[str]] = frozenset()
    """Plain fields that a frame omits if they have their default."""
    RESTARTS: ClassVar[bool] = False
    """True if codecs at both ends begin anew with this message: whatever came before is forgotten."""

    FRAME_KIND: ClassVar[str | None] = None
    """Name in a frame, if it differs from the class name. Frames keep their names when a class is renamed."""

    @classmethod
    def frame_kind(cls) -> str:
        """Return the name of this type of message in a frame."""
        return cls.FRAME_KIND or cls.__name__

    @property
    def main_role(self) -> Role:
        """Role that the frame's overhead counts towards."""
        return next(iter(self.ROLES.values()), "adapter")


M = TypeVar("M", bound=Message)
N = TypeVar("N", bound=Message)


class RoundStart(Message):
    """Server to client: train a round at this cut, from the adapters held and these."""

    round: Length
    cut: Length
    adapters: AdapterState = AdapterState()
    """Global factors of blocks that the client gains with this cut."""
    moments: dict[str, torch.Tensor] = {}
    """Optimizer moments of those blocks, if they are kept."""
    folded: AdapterState = AdapterState()
    """Updates that aggregation has folded into the base of those blocks."""
    ROLES = {"adapters": "adapter", "moments": "adapter", "folded": "adapter"}


class RoundReady(Message):
    """Client to server: the cut is in place."""

    client: Name
    round: Length
    moments: dict[str, torch.Tensor] = {}
    """Optimizer moments of blocks given up, if they are kept."""
    own: AdapterState = AdapterState()
    """The client's own factors of blocks given up, with rules that leave some with each client."""
    ROLES = {"moments": "adapter", "own": "adapter"}


class Activations(Message):
    """Client to server: hidden states at the cut, in training or evaluation."""

    client: Name
    round: Count
    step: Count
    training: bool
    lengths: tuple[Length, ...] = Field(min_length=1)
    """Real tokens of each sequence."""
    labelled: tuple[tuple[Count, Count], ...]
    """Positions [start, stop) of each sequence that have a label."""
    examples: tuple[Count, ...] = ()
    """The client's number of each sequence, only if a codec compares epochs."""
    micro_batch: MicroBatchNumber = 0
    """Number of this micro-batch in its step."""
    micro_batches: Annotated[int, Field(ge=1, le=MOST_MICRO_BATCHES)] = 1
    """Micro-batches of the step."""
    step_labelled: Length | None = None
    """Labelled tokens of all micro-batches of the step; None for a step of one micro-batch."""
    seconds: Seconds = {}
    """Measured by a site in training; empty in simulation."""
    hidden: torch.Tensor
    """(N, D)."""
    labels: torch.Tensor | None = None
    """(M,) token ids; only with `labels: server`."""
    ROLES = {"hidden": "hidden", "labels": "label"}
    LEFT_OUT = frozenset({"micro_batch", "micro_batches", "step_labelled", "seconds"})

    @property
    def labelled_tokens(self) -> int:
        """M."""
        return sum(stop - start for start, stop in self.labelled)

    @property
    def step_tokens(self) -> int:
        """Labelled tokens of the step."""
        return self.labelled_tokens if self.step_labelled is None else self.step_labelled

    @model_validator(mode="after")
    def _sizes_agree(self) -> Activations:
        if len(self.labelled) != len(self.lengths):
            raise ValueError(f"{len(self.lengths)} lengths, but {len(self.labelled)} labelled ranges")
        if self.examples and len(self.examples) != len(self.lengths):
            raise ValueError(f"{len(self.lengths)} lengths, but {len(self.examples)} examples")
        for length, (start, stop) in zip(self.lengths, self.labelled, strict=True):
            if not start < stop <= length:
                raise ValueError(f"labelled positions [{start}, {stop}) of a sequence of {length}")
        if self.hidden.dim() != 2 or len(self.hidden) != sum(self.lengths):
            raise ValueError(f"hidden {tuple(self.hidden.shape)} for {sum(self.lengths)} tokens")
        if self.labels is not None and self.labels.shape != (self.labelled_tokens,):
            raise ValueError(f"labels {tuple(self.labels.shape)} for {self.labelled_tokens} positions")
        if self.micro_batch >= self.micro_batches:
            raise ValueError(f"micro-batch {self.micro_batch} of a step of {self.micro_batches}")
        if self.micro_batches > 1 and self.step_tokens < self.labelled_tokens + self.micro_batches - 1:
            raise ValueError(
                f"{self.labelled_tokens} labelled tokens of {self.step_tokens} in {self.micro_batches} parts"
            )
        if self.micro_batches == 1 and self.step_labelled is not None:
            raise ValueError("step_labelled is given for a step of one micro-batch")
        return self


class LastHidden(Message):
    """Server to client: hidden states after the last block at the labelled positions."""

    step: Count
    micro_batch: MicroBatchNumber = 0
    hidden: torch.Tensor
    """(M, D)."""
    ROLES = {"hidden": "hidden"}
    LEFT_OUT = frozenset({"micro_batch"})


class HeadGradient(Message):
    """Client to server: gradient of the step's mean loss at LastHidden."""

    client: Name
    round: Count
    step: Count
    micro_batch: MicroBatchNumber = 0
    loss: Loss | None = None
    """Mean loss over these M positions in nats, for the record; not sent if the run protects labels."""
    seconds: Seconds = {}
    """Measured by a site; empty in simulation."""
    gradient: torch.Tensor
    """(M, D)."""
    ROLES = {"gradient": "gradient"}
    LEFT_OUT = frozenset({"micro_batch", "loss", "seconds"})


class CutGradient(Message):
    """Server to client: gradient of the step's mean loss at the cut."""

    step: Count
    micro_batch: MicroBatchNumber = 0
    gradient: torch.Tensor
    """(N, D)."""
    loss: Loss | None = None
    """Mean loss over these M positions in nats, with `labels: server`."""
    ROLES = {"gradient": "gradient"}
    LEFT_OUT = frozenset({"micro_batch"})


class AdapterUpload(Message):
    """Client to server: factors of its blocks after the round, as far as the aggregation rule sends them."""

    client: Name
    round: Length
    adapters: AdapterState
    moments: dict[str, torch.Tensor] = {}
    """Optimizer moments, if the next client continues with them."""
    tokens: Count = 0
    """Labelled tokens trained on, if the client trains without the server, which otherwise counts them."""
    ROLES = {"adapters": "adapter", "moments": "adapter"}


class GlobalAdapters(Message):
    """Server to client: aggregated factors of the client's blocks that it does not have."""

    round: Count
    adapters: AdapterState
    folded: AdapterState = AdapterState()
    """Updates to fold into the frozen base."""
    ROLES = {"adapters": "adapter", "folded": "adapter"}


class HeldOutLoss(Message):
    """Server to client, with `labels: server`: summed loss of one held-out batch."""

    step: Count
    loss: Loss
    tokens: Length
    correct: Count | None = None
    """Labelled tokens that are the most probable ones; None from earlier versions."""
    LEFT_OUT = frozenset({"correct"})


class Evaluation(Message):
    """Client to server: loss of the global adapters on its held-out text."""

    client: Name
    round: Count
    loss: Loss
    """Sum over labelled tokens, in nats; with noise if the run protects labels."""
    tokens: Count
    """Labelled tokens."""
    correct: Count | None = None
    """Those that are the most probable ones; None if the run protects labels, and from earlier versions."""
    LEFT_OUT = frozenset({"correct"})


MESSAGES: dict[str, type[Message]] = {
    kind.frame_kind(): kind
    for kind in (
        RoundStart, RoundReady, Activations, LastHidden, HeadGradient, CutGradient, AdapterUpload,
        GlobalAdapters, HeldOutLoss, Evaluation,
    )
}  # fmt: skip
"""Every message of training and evaluation, by its name in a frame."""


@overload
def expect(message: Message, kind: type[M], /, **fields: object) -> M: ...
@overload
def expect(message: Message, kind: type[M], other: type[N], /, **fields: object) -> M | N: ...
def expect(message: Message, /, *kinds: type[Message], **fields: object) -> Message:
    """Return the message if it has one of these types and these values, such as `step=7`.

    Raises ProtocolError, which names the type or value found and the one expected.
    """
    if not isinstance(message, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ProtocolError(f"received {type(message).__name__}; expected {expected}")
    for name, wanted in fields.items():
        found = getattr(message, name)
        if found != wanted:
            raise ProtocolError(f"received {type(message).__name__} of {name} {found!r}; expected {wanted!r}")
    return message
