"""Send numbered requests over a transport that may lose, delay or repeat messages.

    client: Pipeline -> RequestChannel --ask(bytes)--> Transport --answer(site, bytes)--> server: ReplyCache
    message: "SPFE" | version u16 | channel u16 | number u64 | session key 16 bytes | frame

A client numbers its requests on each channel from 0, and sends the next one after it has the reply to the
last. The server keeps the last number, a digest of the request and the reply for each site and channel. The
same request again gets the same reply and is not processed twice. Another request under that number is
refused, and so is a number that is not the next one. The session key is a secret of one session of the run,
so that messages recorded in another session cannot be replayed.

The transport must not invent the sender: `Answer` gets the site's name from the transport's certificates.
Transports: `flare.transport` over NVIDIA FLARE, and `Direct` in this process.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

from splitft.errors import RepeatError, TransportError, WireError

MAGIC = b"SPFE"
VERSION = 1
CHANNELS = 64
"""Most channels of a client: one for each micro-batch in flight, and one for its heartbeat."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
"""Pause before a request is sent again; it doubles each time."""

_HEAD = struct.Struct("<4sHHQ16s")

Answer = Callable[[str, bytes], bytes]
"""The server's side of a transport: the sender's certified name and its message -> the reply."""


class Transport(Protocol):
    """The client's side of a transport."""

    def ask(self, data: bytes, within_s: float) -> bytes:
        """Carry the message to the server and return its reply.

        Raises TransportError if none comes within that time; the server may have received the message.
        """


class Direct:
    """A transport within this process, for tests and for benchmarks without a network."""

    def __init__(self, site: str, answer: Answer) -> None:
        self._site, self._answer = site, answer

    def ask(self, data: bytes, within_s: float) -> bytes:
        """Call the server on the caller's thread."""
        return self._answer(self._site, data)


@dataclass(frozen=True)
class Envelope:
    """One numbered message."""

    session_key: bytes
    """Secret of this session of the run."""
    channel: int
    """Number of the client's channel."""
    number: int
    """Position on the channel, from 0."""
    frame: bytes
    """Content, read by `protocol.MessageSerializer`."""

    def to_bytes(self) -> bytes:
        """Return the message as it is sent."""
        return _HEAD.pack(MAGIC, VERSION, self.channel, self.number, self.session_key) + self.frame

    @classmethod
    def from_bytes(cls, data: bytes, session_key: bytes, limit: int) -> Envelope:
        """Read a message with a frame of at most `limit` bytes. Raises WireError that says what is wrong."""
        if len(data) > limit + _HEAD.size:
            raise WireError(f"a message of {len(data)} bytes is over the limit of {limit}")
        if len(data) < _HEAD.size:
            raise WireError(f"{len(data)} bytes are too few for a numbered message")
        magic, version, channel, number, key = _HEAD.unpack_from(data)
        if magic != MAGIC or version != VERSION:
            raise WireError(f"not a numbered message of version {VERSION}: {magic!r}, version {version}")
        if not hmac.compare_digest(key, session_key):
            raise RepeatError("the message belongs to another session of the run")
        if channel >= CHANNELS:
            raise WireError(f"channel {channel} of a client; there are {CHANNELS}")
        return cls(session_key, channel, number, data[_HEAD.size :])

    @classmethod
    def for_refusal(cls, data: bytes, session_key: bytes) -> Envelope:
        """Return an empty message with the channel and number of an invalid one, or 0 and 0."""
        try:
            return cls.from_bytes(data[: _HEAD.size], session_key, 0)
        except WireError:
            return cls(session_key, 0, 0, b"")


class RequestChannel:
    """One channel of a client: sends a request until it is answered, then the next."""

    def __init__(self, transport: Transport, session_key: bytes, channel: int, limit: int) -> None:
        self._transport, self._key, self._channel, self._limit = transport, session_key, channel, limit
        self._number = 0

    def ask(self, frame: bytes, within_s: float) -> bytes:
        """Send a frame, again if need be, and return the frame of the reply.

        Raises TransportError after `within_s` without a reply, WireError for a reply to another request.
        """
        data = Envelope(self._key, self._channel, self._number, frame).to_bytes()
        deadline = time.monotonic() + within_s
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                answer = self._transport.ask(data, max(1.0, deadline - time.monotonic()))
                break
            except TransportError:
                if time.monotonic() + pause_s > deadline:
                    raise
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        reply = Envelope.from_bytes(answer, self._key, self._limit)
        if (reply.channel, reply.number) != (self._channel, self._number):
            raise RepeatError(f"the answer to message {reply.number} came, {self._number} was asked")
        self._number += 1
        return reply.frame


class Pipeline:
    """Several requests of one client in flight, each on a channel of its own; replies in the order sent.

        channel 0   send ----------> reply        the client works on the replies that have come
        channel 1        send -----------> reply  while the others are in flight

    Only the sending runs in other threads. Requests are made and replies used by the client alone, in an
    order that neither the network nor the server can change.
    """

    def __init__(self, channels: Sequence[RequestChannel], patience_s: float) -> None:
        self._free, self._patience_s = deque(channels), patience_s
        self._in_flight: deque[tuple[RequestChannel, Future[bytes]]] = deque()
        self._threads = ThreadPoolExecutor(len(channels), thread_name_prefix="channel")

    def __len__(self) -> int:
        return len(self._in_flight)

    @property
    def full(self) -> bool:
        """True if every channel waits for a reply."""
        return not self._free

    def send(self, frame: bytes) -> None:
        """Send on a free channel; there must be one."""
        channel = self._free.popleft()
        self._in_flight.append((channel, self._threads.submit(channel.ask, frame, self._patience_s)))

    def reply(self) -> bytes:
        """Wait for the reply to the oldest request. Raises what `RequestChannel.ask` raises."""
        channel, future = self._in_flight.popleft()
        try:
            return future.result()
        finally:
            self._free.append(channel)

    def drain(self) -> None:
        """Wait for the replies to all requests in flight and discard them, so that every channel is free."""
        wait([future for _, future in self._in_flight])
        self._free.extend(channel for channel, _ in self._in_flight)
        self._in_flight.clear()

    def close(self) -> None:
        """Send no more requests; those in flight may still end."""
        self._threads.shutdown(wait=False)


@dataclass
class _Request:
    """The last request of one channel."""

    number: int
    digest: bytes
    reply: Future[bytes]


class ReplyCache:
    """The server's side of one site's channels: processes a request once, answers it as often as it comes."""

    def __init__(self) -> None:
        self._last: dict[int, _Request] = {}
        self._lock = Lock()

    def has_seen(self, envelope: Envelope) -> bool:
        """Return whether a request came under the number of its channel's last one."""
        with self._lock:
            last = self._last.get(envelope.channel)
        return last is not None and last.number == envelope.number

    def answer(
        self, envelope: Envelope, work: Callable[[bytes], bytes], workers: Executor, within_s: float
    ) -> bytes:
        """Return the reply to a request: from `work` if the request is new, else the earlier reply.

        Raises RepeatError if the number is not due, TransportError if `work` takes longer than `within_s`.
        """
        digest = hashlib.sha256(envelope.frame).digest()
        with self._lock:
            last = self._last.get(envelope.channel)
            due = 0 if last is None else last.number + 1
            if last is not None and envelope.number == last.number:
                if digest != last.digest:
                    raise RepeatError(f"message {envelope.number} comes again with other content")
            elif envelope.number != due:
                raise RepeatError(f"message {envelope.number} comes where {due} is due")
            elif last is not None and not last.reply.done():
                raise RepeatError(f"message {envelope.number} comes before {last.number} is answered")
            else:
                reply = workers.submit(work, envelope.frame)
                last = self._last[envelope.channel] = _Request(envelope.number, digest, reply)
        try:
            frame = last.reply.result(timeout=within_s)
        except FutureTimeoutError as error:
            raise TransportError(f"message {envelope.number} is still being processed") from error
        return Envelope(envelope.session_key, envelope.channel, envelope.number, frame).to_bytes()
