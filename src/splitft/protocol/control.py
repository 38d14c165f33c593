"""The control messages of a deployed run, around the messages of `messages`.

    client                                    server
      Register     workload             ---->          or Declined: the data owner forbids the run
                                        <----  Join            cut, step and global factors of the run
      Next         request for an order ---->
                                        <----  Wait, RoundStart, Train, GlobalAdapters, Evaluate, EndSession
      Activations, HeadGradient         ---->
                                        <----  LastHidden, CutGradient, HeldOutLoss, or Stop, or Refused
      RoundReady, AdapterUpload, Evaluation, Heartbeat: each is answered by the next order

In simulation the client's methods are called directly. Over a network the client sends requests and the
server replies, so that a client needs outbound connections only, and may disconnect at any time.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import Field

from splitft.adapters import AdapterState
from splitft.protocol.messages import Count, ErrorName, Length, Message, Name, Words

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Register(Message):
    """Client to server: text and tokenizer are loaded. Contains counts only, no text."""

    FRAME_KIND = "Hello"

    client: Name
    train_examples: Count
    train_tokens: Count
    eval_examples: Count
    truncated: Count
    tokens_per_batch: Positive
    labelled_per_batch: Positive
    sequences_per_batch: Positive
    padded_length: Positive
    """Mean over its sequences of the longest in their batch."""
    min_cut: Length = 1
    """Shallowest cut that the data owner allows."""
    device: dict[str, Positive] = {}
    """The machine as a `DeviceSpec`, if the data owner describes it; empty for the run's assumption."""


class Declined(Message):
    """Client to server: the data owner forbids this run; the site takes no part in this session."""

    client: Name
    reason: Words


class BaseFile(NamedTuple):
    """One file of the frozen base model."""

    name: Annotated[str, Field(max_length=256)]
    size: Count
    """Bytes."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Hash of the file; for a configuration, of its settings of the model."""


class BaseTensor(NamedTuple):
    """One tensor of the frozen base model."""

    name: Annotated[str, Field(max_length=256)]
    """The model's own name, whatever file it is in."""
    size: Count
    """Bytes."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Hash of its type, shape and bytes."""


class Join(Message):
    """Server to client: state of the run, to begin or resume."""

    round: Count
    """Rounds finished."""
    cut: Length
    steps: Count
    """Optimizer steps of this client that count."""
    adapters: AdapterState = AdapterState()
    """Global factors of blocks [0, cut); none before round 1, when clients compute them from the seed."""
    folded: AdapterState = AdapterState()
    """Updates that aggregation has folded into the base of these blocks."""
    manifest: tuple[BaseFile, ...] = ()
    """Files of the server's base model; the site loads no file that differs."""
    tensors: tuple[BaseTensor, ...] = ()
    """Tensors of the server's base model, so that a site can check those that it holds without the others."""
    ROLES = {"adapters": "adapter", "folded": "adapter"}
    LEFT_OUT = frozenset({"tensors"})


class Next(Message):
    """Client to server: request for the next order."""

    client: Name
    failure: Words = ""
    """Reason in words if the client could not complete the last order."""
    LEFT_OUT = frozenset({"failure"})


class Heartbeat(Message):
    """Client to server: the site is running."""

    FRAME_KIND = "Alive"

    client: Name


class Wait(Message):
    """Server to client: no order yet; ask again."""


class Train(Message):
    """Server to client: take this number of local steps, then upload."""

    round: Length
    steps: Count


class Evaluate(Message):
    """Server to client: evaluate the global adapters on the held-out batches, then report."""

    round: Count


class Stop(Message):
    """Server to client: the round has timed out; drop the current step and upload the factors."""

    round: Length


class Refused(Message):
    """Server to client: the message is invalid, and the client is out of this round."""

    error: ErrorName
    """Name of the error."""
    reason: Words


class EndSession(Message):
    """Server to client: the session ends."""

    FRAME_KIND = "Leave"

    reason: Words


CONTROL_MESSAGES: tuple[type[Message], ...] = (
    Register, Declined, Join, Next, Heartbeat, Wait, Train, Evaluate, Stop, Refused, EndSession,
)  # fmt: skip
