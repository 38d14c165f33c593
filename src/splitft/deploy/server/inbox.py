"""Where sites and server meet: the carrier's many threads on one side, the server's one on the other.

    carrier threads   answer(site, bytes) --checked--> inbox --take()--> server's thread
                      <--bytes-- the answer it waits for <--reply()/post()--

The desk reads and checks every message before anyone works on it: who sends it, whether its number is due,
its size before anything is allocated, its form and its finite numbers. A message that cannot be is answered
with `Refused`, and reported as a `Fault`. What a well-formed message means is `gathering`'s business.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field, replace
from threading import Condition, Lock

from splitft.deploy.requests import Envelope, ReplyCache
from splitft.errors import CarrierError, ProtocolError, SplitftError, WireError
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
from splitft.protocol.frame import open_frame
from splitft.tracking.events import Traffic

HOLD_S = 3.0
"""A message that cannot be answered in this time is not kept: its sender asks again under the same number."""
POLL_S = 2.0
"""A site that asks what is next, and for whom there is nothing, is told to wait after so long."""
WORKERS = 128
"""Messages that can wait for their answers at a time: some for each batch in flight of each site."""
STEP_ANSWER_S = 3600.0
"""A step's answer is due in this time; the round's own deadline comes much earlier."""

FROM_CLIENTS = (
    Register, Declined, Next, Heartbeat, RoundReady, Activations, HeadGradient, AdapterUpload, Evaluation,
)  # fmt: skip
"""What a client may say at all."""


@dataclass(frozen=True)
class Arrival:
    """A checked message that waits for its answer."""

    site: str
    message: Message
    stale: bool = False
    """Whether it was said before the site could know where the run is: a `Join` waits for it."""
    answer: Future[Message] = field(default_factory=Future)

    def reply(self, message: Message) -> None:
        """Answer it, unless the link has ended meanwhile."""
        with contextlib.suppress(InvalidStateError):
            self.answer.set_result(message)


@dataclass(frozen=True)
class Fault:
    """A message that could not be, and was answered so."""

    site: str
    error: SplitftError


@dataclass
class _Site:
    """What the desk keeps for one site."""

    repeats: ReplyCache = field(default_factory=ReplyCache)
    orders: deque[Message] = field(default_factory=deque)
    meter: Meter = field(default_factory=Meter)
    heard: float | None = None
    streams: CodecState = field(default_factory=CodecState)
    owed: str = ""
    """The order that it has fetched and has to answer."""
    coding: Lock = field(default_factory=Lock)
    """Held while its streams are read or written: its lanes have threads of their own."""


class Inbox:
    """The server's counter for the sites of one link."""

    def __init__(
        self,
        sites: Iterable[str],
        link: bytes,
        terms: MessageSerializer,
        frame_limit: int,
        batch_tokens: int,
        seed: int = 0,
    ) -> None:
        self._sites = {name: _Site(streams=CodecState(seed, name)) for name in sites}
        self._link, self._terms, self._limit, self._batch_tokens = link, terms, frame_limit, batch_tokens
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="desk")
        self._inbox: deque[Arrival | Fault] = deque()
        self._unanswered: dict[int, Arrival] = {}
        self._changed = Condition()
        self._closed: EndSession | None = None

    # --- the carrier's threads --------------------------------------------------------------------

    def answer(self, site: str, data: bytes) -> bytes:
        """Answer one message of a site. Implements `carrier.Answer`.

        Raises CarrierError if the answer is not there yet; the site asks again.
        """
        try:
            if site not in self._sites:
                raise ProtocolError(f"{site} is no site of this run")
            envelope = Envelope.from_bytes(data, self._link, self._limit)
            return self._sites[site].repeats.answer(
                envelope, lambda frame: self._work(site, frame), self._workers, HOLD_S
            )
        except WireError as error:
            self._report(site, error)
            return self._outside(data, error)

    def _work(self, site: str, frame: bytes) -> bytes:
        """Read a new message, hand it over, wait for its answer."""
        try:
            with self._sites[site].coding:
                message = self._terms.from_bytes(
                    frame, self._limit, lambda outline: self._check(site, outline), self._sites[site].streams
                )
        except WireError as error:
            self._report(site, error)
            return self._terms.to_bytes(_refusal(error))
        with self._changed:
            self._sites[site].heard = time.monotonic()
            self._sites[site].meter.count("up", message, _payload(frame), len(frame))
        reply = self._reply_to(site, message)
        with self._sites[site].coding:
            data = self._terms.to_bytes(reply, self._sites[site].streams)
        with self._changed:
            self._sites[site].meter.count("down", reply, _payload(data), len(data))
            self._sites[site].heard = time.monotonic()
        return data

    def _check(self, site: str, outline: Message) -> None:
        """Raise for what the site may not send, before any payload is read."""
        if not isinstance(outline, FROM_CLIENTS):
            raise ProtocolError(f"{type(outline).__name__} is not for a client to say")
        if outline.client != site:
            raise ProtocolError(f"{site} sends a message in the name of {outline.client!r}")
        if isinstance(outline, Activations):
            padded = len(outline.lengths) * max(outline.lengths)
            if padded > self._batch_tokens:
                raise ProtocolError(
                    f"{site} sends a batch of {padded} padded tokens; {self._batch_tokens} fit this run"
                )

    def _reply_to(self, site: str, message: Message) -> Message:
        if isinstance(message, Heartbeat):
            return Wait()
        if isinstance(message, Next):
            self._check_owed(site)
            return self._order(site)
        with self._changed:
            if isinstance(message, RoundReady | AdapterUpload | Evaluation):
                self._sites[site].owed = ""
            stale = any(isinstance(order, Join) for order in self._sites[site].orders)
            arrival = Arrival(site, message, stale)
            if self._closed is not None:
                return self._closed
            self._inbox.append(arrival)
            self._unanswered[id(arrival)] = arrival
            self._changed.notify_all()
        try:
            if isinstance(message, Activations | HeadGradient):
                return arrival.answer.result(timeout=STEP_ANSWER_S)
            return self._order(site)
        except FutureTimeoutError as error:
            raise CarrierError(f"no answer to {site} in {STEP_ANSWER_S:.0f} s") from error
        finally:
            with self._changed:
                self._unanswered.pop(id(arrival), None)

    def _order(self, site: str) -> Message:
        """The next order for the site, or Wait."""
        orders = self._sites[site].orders
        with self._changed:
            self._changed.wait_for(lambda: bool(orders) or self._closed is not None, POLL_S)
            if orders:
                order = orders.popleft()
                if isinstance(order, RoundStart | Train | Evaluate):
                    self._sites[site].owed = type(order).__name__
                return order
            return self._closed or Wait()

    def _check_owed(self, site: str) -> None:
        """Who asks what is next, but has not answered what it was asked, could not: nobody waits for it."""
        if order := self._sites[site].owed:
            self._sites[site].owed = ""
            self._report(site, ProtocolError(f"{site} did not manage {order}; its own log says why"))

    def _report(self, site: str, error: SplitftError) -> None:
        with self._changed:
            self._inbox.append(Fault(site, error))
            self._changed.notify_all()

    def _outside(self, data: bytes, error: WireError) -> bytes:
        """A refusal of what is no due message, under the number that it claims, if it has one."""
        claimed = Envelope.claimed(data, self._link)
        return replace(claimed, frame=self._terms.to_bytes(_refusal(error))).to_bytes()

    # --- the server's thread ----------------------------------------------------------------------

    def take(self, window_s: float, within_s: float) -> list[Arrival | Fault]:
        """What has arrived: waits for the first, then as long as the window for others; may be empty."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._inbox), within_s)
            if self._inbox and window_s:
                until = time.monotonic() + window_s
                while (left := until - time.monotonic()) > 0 and len(self._inbox) < len(self._sites):
                    self._changed.wait(left)
            taken = list(self._inbox)
            self._inbox.clear()
        return taken

    def post(self, site: str, order: Message) -> None:
        """Give the site an order, after those that it has not fetched yet."""
        with self._changed:
            self._sites[site].orders.append(order)
            self._changed.notify_all()

    def withdraw(self, site: str) -> None:
        """Forget the orders that the site has not fetched."""
        with self._changed:
            self._sites[site].orders.clear()
            self._sites[site].owed = ""

    def silence_s(self, site: str) -> float:
        """Since when nothing was heard of the site; infinite if it never spoke."""
        with self._changed:
            heard = self._sites[site].heard if site in self._sites else None
        return float("inf") if heard is None else time.monotonic() - heard

    def traffic(self) -> dict[str, Traffic]:
        """Bytes by site since this was asked last."""
        with self._changed:
            return {name: site.meter.traffic() for name, site in self._sites.items()}

    def traffic_of(self, site: str) -> Traffic:
        """Bytes of one site since it, or all, were asked last."""
        with self._changed:
            return self._sites[site].meter.traffic()

    def close(self, reason: str) -> None:
        """End the link: whoever asks, now or later, is told to leave."""
        with self._changed:
            self._closed = EndSession(reason=reason)
            for arrival in self._unanswered.values():
                arrival.reply(self._closed)
            self._inbox.clear()
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        """Whether the link has ended."""
        return self._closed is not None

    @property
    def sites(self) -> Mapping[str, float | None]:
        """When each site was heard last, on the monotonic clock."""
        return {name: site.heard for name, site in self._sites.items()}


def _payload(frame: bytes) -> dict[str, int]:
    """Bytes of each tensor of a frame that is known to be sound."""
    entries = open_frame(frame).entries
    return {name: sum(part.nbytes for part in entry.parts.values()) for name, entry in entries.items()}


def _refusal(error: SplitftError) -> Refused:
    return Refused(error=type(error).__name__, reason=str(error)[:2000])
