"""Bound what one site may ask of the server, so that a flood slows only its sender.

    message --admit--> no: held for a second, then turned away unread (TransportError)
                  +--> yes: read and processed --release-->

Two bounds for each site:

    underway    messages, and their bytes, that the server holds at one time
    credit      points that refill with time; what an honest site seldom sends costs points

The steps, orders and uploads that a site owes cost nothing: their number is bounded by what the server has
ordered. Heartbeats, repeated messages and invalid ones cost points. A site without points is not read until
it has some again, so the threads, the parser and the queue are left to the others. An honest site that is
turned away loses time only: it sends the same request again under its number.

A sender that waits for replies is slowed by being held. One that does not still costs what the transport
spends on a message before it comes here, and a few microseconds.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from threading import Lock, Semaphore

from splitft.errors import TransportError
from splitft.specs.training import MOST_IN_FLIGHT

CREDIT, CREDIT_PER_S = 128.0, 16.0
"""Points of a site at the start of a session and at most, and points that come back in a second."""
HEARTBEAT, REPEATED, UNASKED, INVALID = 1.0, 1.0, 8.0, 8.0
"""Points of a heartbeat, of a message that was sent before, of one that no order asked for, and of one that
is refused: two invalid messages a second are read for good."""
MOST_HELD, TURN_AWAY_S = 32, 1.0
"""Messages of all sites together that are held before they are turned away, and for how long. Each holds a
thread of the transport; FLARE has 64 for requests."""


@dataclass(frozen=True)
class InboxLimits:
    """The most that one site may send, and have underway, at one time."""

    frame_bytes: int
    """Bytes of a message."""
    batch_tokens: int
    """Tokens of a batch, padding included."""
    in_flight: int = MOST_IN_FLIGHT
    """Micro-batches at the server at once, each on a channel of its own."""
    example_ids: bool = False
    """True if the run's codecs need the numbers of examples; other runs must not send them."""

    @property
    def messages(self) -> int:
        """Messages underway: a lost connection can leave that of each channel here twice."""
        return 2 * (self.in_flight + 2)

    @property
    def nbytes(self) -> int:
        """Bytes underway; the parts of a step together are no larger than one longest message."""
        return 4 * self.frame_bytes


@dataclass
class Quota:
    """What one site has underway, and its credit. Used by the transport's threads."""

    limits: InboxLimits
    room: Semaphore = field(default_factory=lambda: Semaphore(MOST_HELD))
    """Places for messages that are held before they are turned away; all sites share them."""
    credit: float = CREDIT
    messages: int = 0
    """Messages that are underway."""
    nbytes: int = 0
    """Their bytes."""
    turned_away: int = 0
    """Messages that were not read, over the session."""
    _at: float = field(default_factory=time.monotonic)
    _lock: Lock = field(default_factory=Lock)

    def admit(self, site: str, nbytes: int) -> None:
        """Count a message as underway. Raises TransportError, perhaps after a second, if it is not read."""
        with self._lock:
            self._refill()
            full = self.nbytes + nbytes > self.limits.nbytes and self.messages > 0
            if self.credit <= 0:
                reason = f"{site} has sent too many messages that were invalid or not due"
            elif full or self.messages >= self.limits.messages:
                reason = f"{site} has {self.messages} messages of {self.nbytes} bytes underway"
            else:
                self.messages += 1
                self.nbytes += nbytes
                return
            self.turned_away += 1
        if self.room.acquire(blocking=False):
            time.sleep(TURN_AWAY_S)
            self.room.release()
        raise TransportError(reason)

    def release(self, nbytes: int) -> None:
        """Count a message as done."""
        with self._lock:
            self.messages -= 1
            self.nbytes -= nbytes

    def charge(self, points: float) -> None:
        """Take points; the debt is at most what refills in a few seconds."""
        with self._lock:
            self._refill()
            self.credit = max(self.credit - points, -INVALID)

    def _refill(self) -> None:
        now = time.monotonic()
        self.credit = min(CREDIT, self.credit + (now - self._at) * CREDIT_PER_S)
        self._at = now
