"""Numbered messages: what is lost is sent again, what comes twice changes nothing.

    "SPFE" | version u16 | lane u16 | number u64 | link 16 bytes | frame

A client numbers its messages on each of its lanes from 0, and sends the next when it has the answer to the
last. The server keeps, by site and lane, the last number, a digest of the message and its answer: the same
message again gets the same answer and is not worked on twice, another one under that number is refused, and
so is a number that is not due. The link is a secret of one link of the job chain, so that nothing recorded
in another link can be played back.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from threading import Lock

from splitft.deploy.transport import Transport
from splitft.errors import CarrierError, RepeatError, WireError

MAGIC = b"SPFE"
VERSION = 1
LINK_BYTES = 16
LANES = 64
"""Lanes that a client may use at most: batches in flight and its sign of life."""

_HEAD = struct.Struct("<4sHHQ16s")


@dataclass(frozen=True)
class Envelope:
    """One numbered message."""

    link: bytes
    """Secret of this link of the chain."""
    lane: int
    """Which of the client's lanes."""
    number: int
    """Its place on the lane, from 0."""
    frame: bytes
    """What it says; `protocol.Terms` reads it."""

    def to_bytes(self) -> bytes:
        """As it travels."""
        return _HEAD.pack(MAGIC, VERSION, self.lane, self.number, self.link) + self.frame

    @classmethod
    def from_bytes(cls, data: bytes, link: bytes, limit: int) -> Envelope:
        """Read one of at most `limit` bytes. Raises WireError that says what is wrong with it."""
        if len(data) > limit + _HEAD.size:
            raise WireError(f"a message of {len(data)} bytes is over the limit of {limit}")
        if len(data) < _HEAD.size:
            raise WireError(f"{len(data)} bytes are too few for a numbered message")
        magic, version, lane, number, secret = _HEAD.unpack_from(data)
        if magic != MAGIC or version != VERSION:
            raise WireError(f"not a numbered message of version {VERSION}: {magic!r}, version {version}")
        if not hmac.compare_digest(secret, link):
            raise RepeatError("the message belongs to another link of the run")
        if lane >= LANES:
            raise WireError(f"lane {lane} of a client; there are {LANES}")
        return cls(link, lane, number, data[_HEAD.size :])

    @classmethod
    def claimed(cls, data: bytes, link: bytes) -> Envelope:
        """An empty one in the place that a message claims; in the first place if it claims none."""
        try:
            return cls.from_bytes(data[: _HEAD.size], link, 0)
        except WireError:
            return cls(link, 0, 0, b"")


class RequestChannel:
    """The client's side of one lane: asks until it is answered."""

    def __init__(self, carrier: Transport, link: bytes, lane: int, limit: int) -> None:
        self._carrier, self._link, self._lane, self._limit = carrier, link, lane, limit
        self._number = 0

    def ask(self, frame: bytes, within_s: float) -> bytes:
        """Send, again and again if need be, until the answer is here.

        Raises CarrierError if the time is up, WireError if what comes is not the answer to this message.
        """
        data = Envelope(self._link, self._lane, self._number, frame).to_bytes()
        until = time.monotonic() + within_s
        pause_s = 0.1
        while True:
            try:
                answer = self._carrier.ask(data, max(1.0, until - time.monotonic()))
                break
            except CarrierError:
                if time.monotonic() + pause_s > until:
                    raise
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 5.0)
        envelope = Envelope.from_bytes(answer, self._link, self._limit)
        if (envelope.lane, envelope.number) != (self._lane, self._number):
            raise RepeatError(f"the answer to message {envelope.number} came, {self._number} was asked")
        self._number += 1
        return envelope.frame


@dataclass
class _Last:
    """The last message of one lane."""

    number: int
    digest: bytes
    answer: Future[bytes]


class ReplyCache:
    """The server's side of one site's lanes: a message is worked on once, answered as often as it comes."""

    def __init__(self) -> None:
        self._last: dict[int, _Last] = {}
        self._lock = Lock()

    def answer(
        self, envelope: Envelope, work: Callable[[bytes], bytes], workers: Executor, within_s: float
    ) -> bytes:
        """The answer to this message: from `work` if it is new, otherwise as it was or will be given.

        Raises RepeatError if it cannot come now, CarrierError if it is still worked on after `within_s`.
        """
        digest = hashlib.sha256(envelope.frame).digest()
        with self._lock:
            last = self._last.get(envelope.lane)
            due = 0 if last is None else last.number + 1
            if last is not None and envelope.number == last.number:
                if digest != last.digest:
                    raise RepeatError(f"message {envelope.number} comes again with other content")
            elif envelope.number != due:
                raise RepeatError(f"message {envelope.number} comes where {due} is due")
            elif last is not None and not last.answer.done():
                raise RepeatError(f"message {envelope.number} comes before {last.number} is answered")
            else:
                answer = workers.submit(work, envelope.frame)
                last = self._last[envelope.lane] = _Last(envelope.number, digest, answer)
        try:
            frame = last.answer.result(timeout=within_s)
        except FutureTimeoutError as error:
            raise CarrierError(f"message {envelope.number} is still being worked on") from error
        return Envelope(envelope.link, envelope.lane, envelope.number, frame).to_bytes()
