"""Receive the sites' messages on the transport's threads and hand them to the server's one thread.

    transport's threads   answer(site, bytes) --checked--> Arrival --take()--> server's thread
                          <--bytes-- the reply it waits for <--reply(), post()--

Every message is read and checked before anything else uses it: the sender, the request number, the size
before memory is allocated, the form, and that numbers are finite. An invalid message is answered with
`Refused` and reported as a `Fault`. What a valid message means to the run is decided in `liveness` and
`steps`. What one site may have underway is bounded (`quota`), and sites take turns (`arrivals`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field, replace
from threading import Condition, Semaphore

from splitft.deploy.requests import Envelope, ReplyCache
from splitft.deploy.server.arrivals import Arrival, ArrivalQueue, Fault, refusal
from splitft.deploy.server.claims import check_outline, unusable
from splitft.deploy.server.quota import HEARTBEAT, INVALID, MOST_HELD, REPEATED, UNASKED, InboxLimits, Quota
from splitft.deploy.server.site_codecs import SiteCodecs
from splitft.deploy.server.uptime import UPTIME
from splitft.errors import ProtocolError, SiteFailureError, SplitftError, TransportError, WireError
from splitft.protocol import (
    AdapterUpload,
    ChooseCodecs,
    CodecsChosen,
    EndSession,
    Evaluate,
    Evaluation,
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
    TryCodec,
    Wait,
)
from splitft.protocol.channel import Meter
from splitft.protocol.serializer import ON_THE_CPU, Place
from splitft.tracking.events import Traffic

HOLD_S = 3.0
"""A request without a reply after this long is let go: its sender repeats it under the same number."""
POLL_S = 2.0
"""A site that asks for its next order, and for which there is none, is told to wait after this long."""
STEP_ANSWER_S = 3600.0
"""Longest wait for the reply to a step; the round's own deadline comes much earlier."""


@dataclass
class _Site:
    """One site's side of the inbox."""

    codecs: SiteCodecs
    quota: Quota
    replies: ReplyCache = field(default_factory=ReplyCache)
    orders: deque[Message] = field(default_factory=deque)
    """Orders that the site has not fetched yet."""
    open_order: str = ""
    """The order that it has fetched and not completed."""
    meter: Meter = field(default_factory=Meter)
    heard: float | None = None
    """Time of its last message, on the clock of `uptime`."""


class Inbox:
    """The server's inbox for the sites of one session."""

    def __init__(
        self,
        sites: Iterable[str],
        session_key: bytes,
        serializer: MessageSerializer,
        limits: InboxLimits,
        seed: int = 0,
    ) -> None:
        room = Semaphore(MOST_HELD)
        self._sites = {name: _Site(SiteCodecs(serializer, seed, name), Quota(limits, room)) for name in sites}
        self._strangers: set[str] = set()  # senders that are no site of the session
        self._key, self._serializer, self._limits = session_key, serializer, limits
        self.place: Place = ON_THE_CPU
        """Device on which the server computes with what arrives; the CPU until there is a server."""
        # a thread for each message that may be underway, so that no site waits for another's
        workers = max(1, len(self._sites)) * limits.messages
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="inbox")
        self._arrived = ArrivalQueue()
        self._unanswered: dict[int, Arrival] = {}
        self._changed = Condition()
        self._end: EndSession | None = None

    # --- the transport's threads ------------------------------------------------------------------

    def answer(self, site: str, data: bytes) -> bytes:
        """Answer one message of a site. Implements `requests.Answer`.

        Raises TransportError if the reply is not ready yet; the site repeats its request.
        """
        own = self._sites.get(site)
        if own is None:
            return self._refused(site, data, ProtocolError(f"{site} is no site of this run"))
        own.quota.admit(site, len(data))
        try:
            envelope = Envelope.from_bytes(data, self._key, self._limits.frame_bytes)
            if own.replies.has_seen(envelope):
                own.quota.charge(REPEATED)
            return own.replies.answer(
                envelope, lambda frame: self._process(site, frame), self._workers, HOLD_S
            )
        except WireError as error:
            return self._refused(site, data, error)
        finally:
            own.quota.release(len(data))

    def _refused(self, site: str, data: bytes, error: SplitftError) -> bytes:
        """Report an invalid message and return the reply to it."""
        frame = self._invalid(site, error)
        return replace(Envelope.for_refusal(data, self._key), frame=frame).to_bytes()

    def _invalid(self, site: str, error: SplitftError) -> bytes:
        """Report an invalid message and return the frame of the reply to it."""
        self._report(site, error)
        return self._serializer.to_bytes(refusal(error))

    def _process(self, site: str, frame: bytes) -> bytes:
        """Read a new message, hand it over, and wait for its reply."""
        own = self._sites[site]
        try:
            received = own.codecs.receive(
                frame,
                self._limits.frame_bytes,
                lambda outline: check_outline(site, outline, self._limits),
                self.place,
                choosing=own.open_order == ChooseCodecs.__name__,
            )
        except WireError as error:
            return self._invalid(site, error)
        except Exception as error:  # whatever the bytes have caused is their sender's fault
            return self._invalid(site, unusable(site, "message", error))
        with self._changed:
            own.heard = UPTIME.now()
            own.meter.count("up", received.message, received.payload_bytes, len(frame))
        reply = self._reply_to(site, received.message)
        if isinstance(reply, Refused):
            own.quota.charge(INVALID)
        try:
            packed = own.codecs.pack(reply)
        except SplitftError as error:  # such as hidden states that overflow in the server's blocks
            return self._invalid(site, error)
        data = packed.to_bytes()
        with self._changed:
            own.meter.count("down", reply, packed.header.payload_bytes, len(data))
            own.heard = UPTIME.now()
        return data

    def _reply_to(self, site: str, message: Message) -> Message:
        """Hand a message over and wait for the reply: that to a step, otherwise the site's next order."""
        own = self._sites[site]
        if isinstance(message, Heartbeat | TryCodec):
            own.quota.charge(HEARTBEAT)
            return Wait()
        if isinstance(message, Next):
            self._check_order_done(site, message.failure)
            return self._next_order(site)
        if isinstance(message, Register):  # it completes no order
            own.quota.charge(UNASKED)
            self._check_order_done(site, "")
        with self._changed:
            if isinstance(message, RoundReady | AdapterUpload | Evaluation | CodecsChosen):
                own.quota.charge(0 if own.open_order else UNASKED)
                own.open_order = ""
            stale = any(isinstance(order, Join) for order in own.orders)
            arrival = Arrival(site, message, stale)
            if self._end is not None:
                return self._end
            self._arrived.add(arrival)
            self._unanswered[id(arrival)] = arrival
            self._changed.notify_all()
        try:
            if arrival.is_step:
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
                if isinstance(order, RoundStart | Train | Evaluate | ChooseCodecs):
                    own.open_order = type(order).__name__
                return order
            return self._end or Wait()

    def _check_order_done(self, site: str, failure: str) -> None:
        """Report a fault if a site asks for its next order without completing its last one."""
        order, self._sites[site].open_order = self._sites[site].open_order, ""
        if failure:
            self._report(site, SiteFailureError(failure))
        elif order:
            self._report(site, ProtocolError(f"{site} did not complete {order}; its own log says why"))

    def _report(self, site: str, error: SplitftError) -> None:
        """Report an invalid message: charge the site, or name a stranger once."""
        with self._changed:
            if site in self._sites:
                self._sites[site].quota.charge(INVALID)
                self._sites[site].open_order = ""  # void: the site will be out of the round
            elif site in self._strangers:
                return
            else:
                self._strangers.add(site)
            self._arrived.add(Fault(site, error))
            self._changed.notify_all()

    # --- the server's thread ----------------------------------------------------------------------

    def take(self, window_s: float, within_s: float) -> list[Arrival | Fault]:
        """Return what has arrived, perhaps nothing.

        Waits up to `within_s` for the first message, and then `window_s` for those of other sites.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self._arrived) > 0, within_s)
            if len(self._arrived) and window_s:
                until = time.monotonic() + window_s
                while (left := until - time.monotonic()) > 0 and len(self._arrived) < len(self._sites):
                    self._changed.wait(left)
            return self._arrived.take()

    def post(self, site: str, order: Message) -> None:
        """Queue an order for the site."""
        with self._changed:
            self._sites[site].orders.append(order)
            self._changed.notify_all()

    def use_codecs(self, site: str, hidden: str, gradient: str) -> None:
        """Use the codecs that a site chose in an earlier session."""
        self._sites[site].codecs.use(hidden, gradient)

    def withdraw(self, site: str) -> None:
        """Drop the orders that the site has not fetched."""
        with self._changed:
            self._sites[site].orders.clear()
            self._sites[site].open_order = ""

    def silence_s(self, site: str) -> float:
        """Return seconds since the site's last message; infinite if there was none."""
        with self._changed:
            heard = self._sites[site].heard if site in self._sites else None
        return float("inf") if heard is None else UPTIME.now() - heard

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
            self._arrived.take()
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        """True if the session has ended."""
        return self._end is not None

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites of the session."""
        return tuple(self._sites)

    def turned_away(self, site: str) -> int:
        """Return the number of messages of a site that were not read, because it sent too many."""
        return self._sites[site].quota.turned_away
