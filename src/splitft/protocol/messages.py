"""The conversation between a client and the server, as data.

    server                                   client
      RoundStart      cut, what is new  ---->
                                        <----  RoundReady      moments of blocks given up
   each step:
                                        <----  Activations     hidden at the cut (N, D)
      LastHidden      (M, D)            ---->                  head and loss on the client
                                        <----  HeadGradient    (M, D)
      CutGradient     (N, D)            ---->
   (a step may be divided into micro-batches, of which some are underway at once: the same for each of them)
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

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from splitft.adapters import AdapterState
from splitft.errors import ProtocolError
from splitft.specs.training import MOST_MICRO_BATCHES
from splitft.tracking.events import Role

Count = Annotated[int, Field(ge=0)]
Length = Annotated[int, Field(ge=1)]
Loss = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
MicroBatch = Annotated[int, Field(ge=0, lt=MOST_MICRO_BATCHES)]
Seconds = dict[Literal["client_forward", "head", "client_backward"], Annotated[float, Field(ge=0, le=1e6)]]
"""Seconds that a client has computed since its last message of the round, by leg."""


class Message(BaseModel):
    """One message; its tensor fields are listed by role."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    ROLES: ClassVar[Mapping[str, Role]] = {}
    """Role of each field that holds tensors; the first is also charged with the frame's overhead."""
    LEFT_OUT: ClassVar[frozenset[str]] = frozenset()
    """Plain fields that a frame does not carry where they have their default."""

    FRAME_KIND: ClassVar[str | None] = None
    """Name of the kind in a frame, where it is not that of the class: frames keep the names they have."""

    @classmethod
    def frame_kind(cls) -> str:
        """Name of this kind of message in a frame."""
        return cls.FRAME_KIND or cls.__name__

    @property
    def main_role(self) -> Role:
        """What the message is mainly about."""
        return next(iter(self.ROLES.values()), "adapter")


M = TypeVar("M", bound=Message)


class RoundStart(Message):
    """Server: train a round at this cut, beginning with the adapters that you hold and these."""

    round: Length
    cut: Length
    adapters: AdapterState = AdapterState()
    """Global factors of blocks that the client gains with this cut."""
    moments: dict[str, torch.Tensor] = {}
    """Optimizer moments of those blocks, when kept."""
    folded: AdapterState = AdapterState()
    """What aggregation has folded into the base of those blocks."""
    ROLES = {"adapters": "adapter", "moments": "adapter", "folded": "adapter"}


class RoundReady(Message):
    """Client: the cut is in place."""

    client: Name
    round: Length
    moments: dict[str, torch.Tensor] = {}
    """Optimizer moments of blocks given up, when kept."""
    own: AdapterState = AdapterState()
    """Factors of blocks given up that are the client's own, by rules that leave some with it."""
    ROLES = {"moments": "adapter", "own": "adapter"}


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
    examples: tuple[Count, ...] = ()
    """The client's number for each sequence, only where a codec compares epochs."""
    micro_batch: MicroBatch = 0
    """Which part of its step this is."""
    micro_batches: Annotated[int, Field(ge=1, le=MOST_MICRO_BATCHES)] = 1
    """Parts of the step."""
    step_labelled: Length | None = None
    """Labelled tokens of all parts of the step; left out for a step of one part, whose M it is."""
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
        """Labelled tokens of the whole step."""
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
            raise ValueError("step_labelled of a step of one part")
        return self


class LastHidden(Message):
    """Server: hidden states after the last block at the labelled positions."""

    step: Count
    micro_batch: MicroBatch = 0
    hidden: torch.Tensor
    """(M, D)."""
    ROLES = {"hidden": "hidden"}
    LEFT_OUT = frozenset({"micro_batch"})


class HeadGradient(Message):
    """Client: gradient of its step's mean loss at LastHidden."""

    client: Name
    round: Count
    step: Count
    micro_batch: MicroBatch = 0
    loss: Loss
    """Mean loss over these M positions in nats, for the record."""
    seconds: Seconds = {}
    """Measured by a site; empty in simulation."""
    gradient: torch.Tensor
    """(M, D)."""
    ROLES = {"gradient": "gradient"}
    LEFT_OUT = frozenset({"micro_batch", "seconds"})


class CutGradient(Message):
    """Server: gradient of the mean loss of the client's step at the cut."""

    step: Count
    micro_batch: MicroBatch = 0
    gradient: torch.Tensor
    """(N, D)."""
    loss: Loss | None = None
    """Mean loss over these M positions in nats, with `labels: server`."""
    ROLES = {"gradient": "gradient"}
    LEFT_OUT = frozenset({"micro_batch"})


class AdapterUpload(Message):
    """Client: its blocks' factors after the round, those that the aggregation rule lets travel."""

    client: Name
    round: Length
    adapters: AdapterState
    moments: dict[str, torch.Tensor] = {}
    """Optimizer moments, when they are handed on to the next client."""
    tokens: Count = 0
    """Labelled tokens trained on, where the server has no part in it; otherwise it counts them itself."""
    ROLES = {"adapters": "adapter", "moments": "adapter"}


class GlobalAdapters(Message):
    """Server: what aggregation made of the client's blocks, as far as the client lacks it."""

    round: Count
    adapters: AdapterState
    folded: AdapterState = AdapterState()
    """What joins the frozen base."""
    ROLES = {"adapters": "adapter", "folded": "adapter"}


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
    kind.frame_kind(): kind
    for kind in (
        RoundStart, RoundReady, Activations, LastHidden, HeadGradient, CutGradient, AdapterUpload,
        GlobalAdapters, HeldOutLoss, Evaluation,
    )
}  # fmt: skip
"""Every message of the conversation itself, by name."""


def expect(message: Message, *kinds: type[M], **fields: object) -> M:
    """Return the message; raise ProtocolError unless it is of one of these kinds and has these values.

    `expect(message, HeadGradient, client="a", round=2, step=7)` is how each side says what may follow.
    """
    if not isinstance(message, kinds):
        awaited = " or ".join(kind.__name__ for kind in kinds)
        raise ProtocolError(f"{type(message).__name__} came where {awaited} was due")
    for name, wanted in fields.items():
        found = getattr(message, name)
        if found != wanted:
            raise ProtocolError(f"{type(message).__name__} of {name} {found!r} came, {wanted!r} was due")
    return message
