"""The server of a session as a site talks to it: channels, heartbeats, waiting, and words for a failure."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from splitft.deploy.requests import CHANNELS, RequestChannel, Transport
from splitft.deploy.run_terms import HEADER_BYTES
from splitft.errors import DataError, SplitftError
from splitft.protocol import Declined, Heartbeat, MessageSerializer
from splitft.run.codec_choice import Candidates
from splitft.specs import WireSpec

HEARTBEAT_CHANNEL = CHANNELS - 1
PLAIN = MessageSerializer(width=1, dtype=torch.float32, adapter_dtype=torch.float32, wire=WireSpec())
"""Writes messages without tensors, of any run."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Connection:
    """The server of one session, as a site talks to it."""

    transport: Transport
    session_key: bytes
    serializer: MessageSerializer
    frame_limit: int
    """Longest message, in bytes."""
    patience_s: float
    """The server is given up after this long without a reply."""
    heartbeat_s: float | None = None
    """Time between two heartbeats, which keep a slow site from being lost; None for none."""
    in_flight: int = 1
    """Micro-batches at the server at once."""
    seed: int = 0
    """Seed of the codecs' random numbers."""
    candidates: Candidates = Candidates()  # noqa: RUF009 frozen
    """Codecs that this site may choose, with `wire: auto`."""

    def channel(self, number: int) -> RequestChannel:
        """Return a channel to the server."""
        return RequestChannel(self.transport, self.session_key, number, self.frame_limit)


def decline(name: str, reason: str, transport: Transport, session_key: bytes, patience_s: float) -> None:
    """Tell the server that a site takes no part, and why. Raises TransportError if it does not reply.

    Needs nothing of the run, so that a site without its base model can decline too.
    """
    logger.warning("%s declines: %s", name, reason)
    frame = PLAIN.to_bytes(Declined(client=name, reason=reason[:2000]))
    RequestChannel(transport, session_key, 0, HEADER_BYTES).ask(frame, patience_s)


class WorkClock:
    """The time in which a site works, rather than waits for the server."""

    def __init__(self) -> None:
        self.asked_s = 0.0
        """Seconds for which the last request waited."""
        self._since, self._idle_s = time.monotonic(), 0.0

    def waiting(self, ask: Callable[[], bytes]) -> bytes:
        """Return what the server answers; the time until then is not this site's work."""
        began = time.monotonic()
        try:
            return ask()
        finally:
            self.asked_s = time.monotonic() - began
            self._idle_s += self.asked_s

    def pause(self, seconds: float) -> None:
        """Wait, without work."""
        time.sleep(seconds)
        self._idle_s += seconds

    def worked_s(self) -> float:
        """Return the seconds of work since the last call."""
        now = time.monotonic()
        worked, self._since, self._idle_s = now - self._since - self._idle_s, now, 0.0
        return worked


@contextmanager
def heartbeats(connection: Connection, name: str) -> Iterator[None]:
    """Send a `Heartbeat` at intervals from a thread."""
    done = threading.Event()

    def beat(every_s: float) -> None:
        channel = connection.channel(HEARTBEAT_CHANNEL)
        frame = connection.serializer.to_bytes(Heartbeat(client=name))
        while not done.wait(every_s):
            try:
                channel.ask(frame, connection.patience_s)
            except SplitftError as error:
                logger.info("%s: no heartbeat was answered: %s", name, error)

    if connection.heartbeat_s is not None:
        threading.Thread(target=beat, args=(connection.heartbeat_s,), daemon=True).start()
    try:
        yield
    finally:
        done.set()


def reason_of(error: Exception) -> str:
    """Return what the server may be told of a failure here: no line of the text, no traceback."""
    if isinstance(error, DataError):
        return "its text cannot be used; its own log says why"
    if isinstance(error, OSError):
        return f"its disk or its system failed: {error.strerror or type(error).__name__}"
    if isinstance(error, SplitftError):
        return str(error)[:2000]
    return f"unexpected {type(error).__name__}; its own log says more"
