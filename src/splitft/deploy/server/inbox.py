"""Receive the sites' messages on the transport's threads and hand them to the server's one thread.

    transport's threads   answer(site, bytes) --checked--> Arrival --take()--> server's thread
                          <--bytes-- the reply it waits for <--reply(), post()--

Every message is read and checked before anything else uses it: the sender, the request number, the size
before memory is allocated, the form, and that numbers are finite. An invalid message is answered with
`Refused` and reported as a `Fault`. What a valid message means to the run is decided in `liveness` and
`steps`.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field, replace
from threading import Condition, Lock

from splitft.deploy.requests import Envelope, ReplyCache
from splitft.errors import ProtocolError, SplitftError, TransportError, WireError
from splitft.protocol import (
    Activations,
    AdapterUpload,
    Declined,
    EndSession,
    Evaluate,
    Evaluation,
    HeadGradient,
    Heartbeat,
    Join,
    Message,
    MessageSerializer,
    Next,
    Refused,
    Register,
    RoundReady,
    RoundStart,
    Train,
    Wait,
)
from splitft.protocol.channel import Meter
from splitft.protocol.codec_state import CodecState
from splitft.tracking.events import Traffic

HOLD_S = 3.0
"""A request without a reply after this long is let go: its sender repeats it under the same number."""
POLL_S = 2.0
"""A site that asks for its next order, and for which there is none, is told to wait after this long."""
WORKERS = 128
"""Most requests that can wait for their reply at a time: some for each micro-batch in flight of each site."""
STEP_ANSWER_S = 3600.0
"""Longest wait for the reply to a step; the round's own deadline comes much earlier."""

FROM_CLIENTS = (
    Register, Declined, Next, Heartbeat, RoundReady, Activations, HeadGradient, AdapterUpload, Evaluation,
)  # fmt: skip
"""Messages that a client may send."""


@dataclass(frozen=True)
class Arrival:
    """A checked message that waits for its reply."""

    site: str
    message: Message
    stale: bool = False
    """Whether it was sent before the site could know the run's state: a `Join` waits for it."""
    answer: Future[Message] = field(default_factory=Future)

    def reply(self, message: Message) -> None:
        """Send the reply, unless the session has ended meanwhile."""
        with contextlib.suppress(InvalidStateError):
            self.answer.set_result(message)

    def refuse(self, error: SplitftError) -> None:
        """Tell the sender why its message is not processed."""
        self.reply(_refusal(error))


@dataclass(frozen=True)
class Fault:
    """An invalid message, which has been refused."""

    site: str
    error: SplitftError


@dataclass
class _Site:
    """One site's side of the inbox."""

    codec_state: CodecState
    codec_lock: Lock = field(default_factory=Lock)
    """Held while `codec_state` is used: the site's channels have threads of their own."""
    replies: ReplyCache = field(default_factory=ReplyCache)
    orders: deque[Message] = field(default_factory=deque)
    """Orders that the site has not fetched yet."""
    open_order: str = ""
    """The order that it has fetched and not completed."""
    meter: Meter = field(default_factory=Meter)
    heard: float | None = None
    """Time of its last message, on the monotonic clock."""


class Inbox:
    """The server's inbox for the sites of one session."""

    def __init__(
        self,
        sites: Iterable[str],
        session_key: bytes,
        serializer: MessageSerializer,
        frame_limit: int,
        batch_tokens: int,
        seed: int = 0,
    ) -> None:
        self._sites = {name: _Site(CodecState(seed, name)) for name in sites}
        self._key, self._serializer = session_key, serializer
        self._limit, self._batch_tokens = frame_limit, batch_tokens
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="inbox")
        self._arrived: deque[Arrival | Fault] = deque()
        self._unanswered: dict[int, Arrival] = {}
        self._changed = Condition()
        self._end: EndSession | None = None

    # --- the transport's threads ------------------------------------------------------------------

    def answer(self, site: str, data: bytes) -> bytes:
        """Answer one message of a site. Implements `requests.Answer`.

        Raises TransportError if the reply is not ready yet; the site repeats its request.
        """
        try:
            if site not in self._sites:
                raise ProtocolError(f"{site} is no site of this run")
            envelope = Envelope.from_bytes(data, self._key, self._limit)
            return self._sites[site].replies.answer(
                envelope, lambda frame: self._process(site, frame), self._workers, HOLD_S
            )
        except WireError as error:
            self._report(site, error)
            frame = self._serializer.to_bytes(_refusal(error))
            return replace(Envelope.for_refusal(data, self._key), frame=frame).to_bytes()

    def _process(self, site: str, frame: bytes) -> bytes:
        """Read a new message, hand it over, and wait for its reply."""
        own = self._sites[site]
        try:
            with own.codec_lock:
                received = self._serializer.receive(
                    frame, self._limit, lambda outline: self._check(site, outline), own.codec_state
                )
        except WireError as error:
            self._report(site, error)
            return self._serializer.to_bytes(_refusal(error))
        with self._changed:
            own.heard = time.monotonic()
            own.meter.count("up", received.message, received.payload_bytes, len(frame))
        reply = self._reply_to(site, received.message)
        with own.codec_lock:
            packed = self._serializer.pack(reply, own.codec_state)
        data = packed.to_bytes()
        with self._changed:
            own.meter.count("down", reply, packed.header.payload_bytes, len(data))
            own.heard = time.monotonic()
        return data

    def _check(self, site: str, outline: Message) -> None:
        """Raise ProtocolError for what the site may not send, before any payload is read."""
        if not isinstance(outline, FROM_CLIENTS):
            raise ProtocolError(f"{type(outline).__name__} is not sent by clients")
        if outline.client != site:
            raise ProtocolError(f"{site} sends a message in the name of {outline.client!r}")
        if isinstance(outline, Activations):
            padded = len(outline.lengths) * max(outline.lengths)
            if padded > self._batch_tokens:
                raise ProtocolError(
                    f"{site} sends a batch of {padded} padded tokens; {self._batch_tokens} fit this run"
                )

    def _reply_to(self, site: str, message: Message) -> Message:
        """Hand a message over and wait for the reply: that to a step, otherwise the site's next order."""
        if isinstance(message, Heartbeat):
            return Wait()
        if isinstance(message, Next):
            self._check_order_done(site)
            return self._next_order(site)
        with self._changed:
            if isinstance(message, RoundReady | AdapterUpload | Evaluation):
                self._sites[site].open_order = ""
            stale = any(isinstance(order, Join) for order in self._sites[site].orders)
            arrival = Arrival(site, message, stale)
            if self._end is not None:
                return self._end
            self._arrived.append(arrival)
            self._unanswered[id(arrival)] = arrival
            self._changed.notify_all()
        try:
            if isinstance(message, Activations | HeadGradient):
                return arrival.answer.result(timeout=STEP_ANSWER_S)
            return self._next_order(site)
        except FutureTimeoutError as error:
            raise TransportError(f"no reply to {site} within {STEP_ANSWER_S:.0f} s") from error
        finally:
            with self._changed:
                self._unanswered.pop(id(arrival), None)

    def _next_order(self, site: str) -> Message:
        """Return the next order for the site, or Wait if none comes."""
        own = self._sites[site]
        with self._changed:
            self._changed.wait_for(lambda: bool(own.orders) or self._end is not None, POLL_S)
            if own.orders:
                order = own.orders.popleft()
                if isinstance(order, RoundStart | Train | Evaluate):
                    own.open_order = type(order).__name__
                return order
            return self._end or Wait()

    def _check_order_done(self, site: str) -> None:
        """Report a fault if a site asks for its next order without completing its last one."""
        if order := self._sites[site].open_order:
            self._sites[site].open_order = ""
            self._report(site, ProtocolError(f"{site} did not complete {order}; its own log says why"))

    def _report(self, site: str, error: SplitftError) -> None:
        with self._changed:
            self._arrived.append(Fault(site, error))
            self._changed.notify_all()

    # --- the server's thread ----------------------------------------------------------------------

    def take(self, window_s: float, within_s: float) -> list[Arrival | Fault]:
        """Return what has arrived, perhaps nothing.

        Waits up to `within_s` for the first message, and then `window_s` for those of other sites.
        """
        with self._changed:
            self._changed.wait_for(lambda: bool(self._arrived), within_s)
            if self._arrived and window_s:
                until = time.monotonic() + window_s
                while (left := until - time.monotonic()) > 0 and len(self._arrived) < len(self._sites):
                    self._changed.wait(left)
            taken = list(self._arrived)
            self._arrived.clear()
        return taken

    def post(self, site: str, order: Message) -> None:
        """Queue an order for the site."""
        with self._changed:
            self._sites[site].orders.append(order)
            self._changed.notify_all()

    def withdraw(self, site: str) -> None:
        """Drop the orders that the site has not fetched."""
        with self._changed:
            self._sites[site].orders.clear()
            self._sites[site].open_order = ""

    def silence_s(self, site: str) -> float:
        """Return seconds since the site's last message; infinite if there was none."""
        with self._changed:
            heard = self._sites[site].heard if site in self._sites else None
        return float("inf") if heard is None else time.monotonic() - heard

    def traffic(self) -> dict[str, Traffic]:
        """Return each site's bytes since the last call."""
        return {name: self.traffic_of(name) for name in self._sites}

    def traffic_of(self, site: str) -> Traffic:
        """Return one site's bytes since the last call of this or of `traffic`."""
        with self._changed:
            return self._sites[site].meter.traffic()

    def close(self, reason: str) -> None:
        """End the session: sites that ask, now or later, are told to leave."""
        with self._changed:
            self._end = EndSession(reason=reason)
            for arrival in self._unanswered.values():
                arrival.reply(self._end)
            self._arrived.clear()
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        """Whether the session has ended."""
        return self._end is not None

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites of the session."""
        return tuple(self._sites)


def _refusal(error: SplitftError) -> Refused:
    return Refused(error=type(error).__name__, reason=str(error)[:2000])
