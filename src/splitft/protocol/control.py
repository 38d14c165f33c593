"""How a client that comes and goes is told what to do: the frame around the conversation of `messages`.

    client                                    server
      Hello        its work in numbers  ---->          or Declined: its data owner forbids what is asked
                                        <----  Join            cut, step, global factors: where the run is
      Next         what is to do?       ---->
                                        <----  Wait, RoundStart, Train, GlobalAdapters, Evaluate, Leave
      Activations, HeadGradient         ---->
                                        <----  LastHidden, CutGradient, HeldOutLoss, or Stop, or Refused
      RoundReady, AdapterUpload, Evaluation, Alive: each is answered by what is to do next

In simulation the client's methods are called in the right order; over a network the client asks and the
server answers, so that a client needs outbound connections only, and may fall silent at any time.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import Field

from splitft.adapters import AdapterState
from splitft.protocol.messages import Count, Length, Message, Name

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Register(Message):
    """Client: I have my text and my tokenizer. Numbers only, nothing of the text."""

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
    """Shallowest cut that its data owner allows."""
    device: dict[str, Positive] = {}
    """What its data owner says of the machine, as `DeviceSpec` has it; empty for what the run assumes."""


class Declined(Message):
    """Client: my data owner forbids what this run asks; I take no part in this link."""

    client: Name
    reason: Annotated[str, Field(max_length=2000)]


class BaseFile(NamedTuple):
    """One file of the frozen base model."""

    name: Annotated[str, Field(max_length=256)]
    size: Count
    """Bytes."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the file; of a configuration, of what it says of the model."""


class Join(Message):
    """Server: take up the run where it is."""

    round: Count
    """Rounds finished."""
    cut: Length
    steps: Count
    """Optimizer steps of yours that count."""
    adapters: AdapterState = AdapterState()
    """Global factors of blocks [0, cut), as far as not everybody can make them: none before round 1."""
    folded: AdapterState = AdapterState()
    """What aggregation has folded into the base of these blocks."""
    manifest: tuple[BaseFile, ...] = ()
    """Files of the base model as the server has them; the site loads nothing that differs."""
    ROLES = {"adapters": "adapter", "folded": "adapter"}


class Next(Message):
    """Client: what is to do?"""

    client: Name


class Heartbeat(Message):
    """Client: I am at work."""

    FRAME_KIND = "Alive"

    client: Name


class Wait(Message):
    """Server: nothing at the moment; ask again."""


class Train(Message):
    """Server: take so many local steps, then upload."""

    round: Length
    steps: Count


class Evaluate(Message):
    """Server: run your held-out batches with the global adapters, then report."""

    round: Count


class Stop(Message):
    """Server: the round's time is up; forget the step underway and upload what you have."""

    round: Length


class Refused(Message):
    """Server: this message cannot be; you are out of this round."""

    error: Name
    """Name of the error."""
    reason: Annotated[str, Field(max_length=2000)]


class EndSession(Message):
    """Server: this link of the run ends."""

    FRAME_KIND = "Leave"

    reason: Annotated[str, Field(max_length=2000)]


CONTROL_MESSAGES: tuple[type[Message], ...] = (
    Register, Declined, Join, Next, Heartbeat, Wait, Train, Evaluate, Stop, Refused, EndSession,
)  # fmt: skip
