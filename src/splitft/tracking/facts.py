"""What the events of a run tell of: bytes, clients, bars of the clock, and who can read what.

    events.py   what happened, and when     RoundDone(traffic={client: Traffic}), RunStarted(clients=...)
    facts.py    what it happened to         Traffic, ClientFacts, Bar

A fact has no time of its own. The rooms above name what they measure by these types as well: the wire counts
bytes by `Role`, and the simulated clock draws its `Bar`s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

Received = Literal["hidden", "adapters", "nothing", "text"]
"""What comes to the server: hidden states (and adapters), adapters alone, nothing, or all text."""
Role = Literal["hidden", "gradient", "adapter", "label"]
"""What a tensor on the wire is: hidden states, their gradients, LoRA factors, or token ids."""


class Fact(BaseModel):
    """Frozen, strict about its keys, documented by its field docstrings."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, ser_json_inf_nan="constants"
    )


class Traffic(Fact):
    """Bytes of one client, by role, as they crossed the wire (frames and all)."""

    up: Mapping[Role, int] = {}
    """From the client to the server."""
    down: Mapping[Role, int] = {}
    """From the server to the client."""


class ClientFacts(Fact):
    """One client as it enters the run."""

    name: str
    """How every other event calls it."""
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
    """Fingerprint of the training examples, to tell whether two runs had the same; nothing if not known."""
    held_out: str = ""
    """Fingerprint of the held-out examples, likewise."""


class Bar(Fact):
    """Something done in a round on the simulated clock: one bar of its Gantt chart."""

    who: str
    """A client, or `server`."""
    leg: str
    """What, such as client_forward, up_hidden or wait."""
    start: float
    """Seconds since the round began, without moving."""
    end: float
    """Likewise."""


PRIVACY = {
    "client": "Labels stay on the clients: the server sees hidden states and gradients, never token ids; "
    "but the text can be read off both, unless noise hides it.",
    "server": "Labels are on the server: it receives the token ids, so it can read the clients' text.",
    "adapters": "The whole model is on every client: the server receives adapters, no hidden states "
    "and no token ids.",
    "nothing": "Every client trains alone: the server receives no text, no hidden states and no adapters.",
    "text": "All text lies in one place: whoever trains there can read it.",
}
"""What the server can read, by where labels are, or by what comes to it if that is no hidden states."""
