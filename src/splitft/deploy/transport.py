"""The seam between our conversation and whatever carries it: bytes go up, the answer comes back.

    client --ask(bytes)--> [ carrier ] --answer(site, bytes)--> server

A carrier may lose, delay or repeat messages: `envelope` makes that harmless. It must not invent who sends:
`answer` gets the name that the carrier's certificates vouch for. Implemented by `flare.carrier` over NVIDIA
FLARE, and by `Direct` in this process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Answer = Callable[[str, bytes], bytes]
"""The server's side: the sender's name, as the carrier vouches for it, and what it sends -> the answer."""


class Transport(Protocol):
    """The client's side."""

    def ask(self, data: bytes, within_s: float) -> bytes:
        """Carry the message to the server and bring back its answer.

        Raises CarrierError if there is none within that time; the server may then have got it, or not.
        """


class Direct:
    """A carrier in this process, for tests and for benchmarks without a network."""

    def __init__(self, site: str, answer: Answer) -> None:
        self._site, self._answer = site, answer

    def ask(self, data: bytes, within_s: float) -> bytes:
        """The server answers at once, on the thread of who asks."""
        return self._answer(self._site, data)
