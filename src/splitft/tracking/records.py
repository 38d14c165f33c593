"""The records inside events: bytes, clients, bars of the clock, and what the server can read.

    events.py    what happened, and when    RoundDone(traffic={client: Traffic}), RunStarted(clients=...)
    records.py   what it happened to        Traffic, ClientInfo, Bar

A record has no time of its own; `Stamped`, the base of all events, adds it. Other packages use these types
too: the protocol counts bytes by `Role`, and the simulated clock draws its `Bar`s.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Received = Literal["hidden", "adapters", "nothing", "text"]
"""Content that reaches the server: hidden states (and adapters), adapters alone, nothing, or all text."""
Role = Literal["hidden", "gradient", "adapter", "label"]
"""Content of a tensor on the wire: hidden states, their gradients, LoRA factors, or token ids."""


class StrictRecord(BaseModel):
    """Base of records and events: frozen, and strict about its keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, ser_json_inf_nan="constants"
    )


class Traffic(StrictRecord):
    """Bytes of one client on the wire, by role, frame headers included."""

    up: Mapping[Role, int] = {}
    """From the client to the server."""
    down: Mapping[Role, int] = {}
    """From the server to the client."""


class ClientInfo(StrictRecord):
    """One client at the start of the run."""

    name: str
    """Its name in every other event."""
    cut: int
    """k: blocks on the client in the first round."""
    train_examples: int
    """Examples it may train on."""
    train_tokens: int
    """Tokens in them, after truncation."""
    eval_examples: int
    """Held-out examples."""
    truncated: int = 0
    """Examples cut off at `data.max_tokens`."""
    trained_on: str = ""
    """Fingerprint of the training examples, to compare two runs; empty if unknown."""
    held_out: str = ""
    """Fingerprint of the held-out examples, likewise."""


class Bar(StrictRecord):
    """One leg of a step on the simulated clock: a bar of its Gantt chart."""

    who: str
    """A client, or `server`."""
    leg: str
    """A leg of a step, such as client_forward, up_hidden or wait."""
    start: float
    """Seconds since the round began, moving of blocks excluded."""
    end: float
    """Likewise."""


PRIVACY = {
    "client": "Labels stay on the clients: the server sees hidden states and gradients, never token ids; "
    "but the text can be read off both, unless noise hides it.",
    "server": "Labels are on the server: it receives the token ids, so it can read the clients' text.",
    "adapters": "The whole model is on every client: the server receives adapters, no hidden states "
    "and no token ids.",
    "nothing": "Every client trains alone: the server receives no text, no hidden states and no adapters.",
    "text": "All text is in one place: whoever trains there can read it.",
}
"""What the server can read, by the place of the labels, or by `Received` if that is not hidden states."""


class Stamped(StrictRecord):
    """Base of all events."""

    t: float = Field(default_factory=time.time)
    """Unix time at which it happened, in seconds."""
