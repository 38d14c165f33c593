"""The control messages of a deployed run, around the messages of `messages`.

    client                                    server
      Register     workload             ---->          or Declined: the data owner forbids the run
                                        <----  Join            cut, step and global factors of the run
      TryCodec, Activations, ..., CodecsChosen    ---->    if asked to (ChooseCodecs), with `wire: auto`
      Next         request for an order ---->
                                        <----  Wait, RoundStart, Train, GlobalAdapters, Evaluate, EndSession
      Activations, HeadGradient         ---->
                                        <----  LastHidden, CutGradient, HeldOutLoss, or Stop, Again, Refused
      LocalStep    a client without a server's blocks has taken a step    ---->
                                        <----  Wait, or Stop, or Refused
      RoundReady, AdapterUpload, Evaluation, Heartbeat: each is answered by the next order

In simulation the client's methods are called directly. Over a network the client sends requests and the
server replies, so that a client needs outbound connections only, and may disconnect at any time.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import Field

from splitft.adapters import AdapterState
from splitft.protocol.messages import Count, ErrorName, Length, Loss, Message, Name, Words

CodecText = Annotated[str, Field(max_length=64)]
"""A codec with its options, as in the section `wire`."""
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
    hidden: CodecText = ""
    """Codec of this client's hidden states, if the run has chosen one for it; empty otherwise."""
    gradient: CodecText = ""
    """Codec of their gradients likewise."""
    ROLES = {"adapters": "adapter", "folded": "adapter"}
    LEFT_OUT = frozenset({"tensors", "hidden", "gradient"})
    RESTARTS = True


class ChooseCodecs(Message):
    """Server to client: try codecs on the held-out batches, and report which fit (`wire: auto`)."""

    round: Count
    """Rounds finished."""


class TryCodec(Message):
    """Client to server: hidden states come and go in this codec from now on, and gradients exactly."""

    client: Name
    hidden: CodecText
    RESTARTS = True


class CodecsChosen(Message):
    """Client to server: the codecs of this client for the rest of the run."""

    client: Name
    hidden: CodecText
    gradient: CodecText
    reason: Words
    """The measurements and the limits."""
    RESTARTS = True


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


class Again(Message):
    """Server to client: another client had its turn meanwhile; send the step again from its first message."""

    step: Count


class LocalStep(Message):
    """Client to server: a step, or a held-out batch, computed by a client that holds the whole model."""

    client: Name
    round: Count
    step: Count
    """Step of the client over the whole run, from 0; in evaluation the number of the batch."""
    training: bool
    sequences: Length
    tokens: Length
    """Labelled tokens."""
    loss: Loss | None = None
    """Mean loss over them in nats, in training; not sent if the run protects labels."""
    seconds: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Seconds of computing."""
    LEFT_OUT = frozenset({"loss", "seconds"})


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
    Register, Declined, Join, ChooseCodecs, TryCodec, CodecsChosen, Next, Heartbeat, Wait, Train, LocalStep,
    Evaluate, Stop, Again, Refused, EndSession,
)  # fmt: skip
