"""A site's side of a deployed run: asks what is to do, does it with its `Client`, and asks again.

    Hello -> Join -> [ RoundStart -> Train: steps -> AdapterUpload -> GlobalAdapters -> Evaluate ] -> Leave

Of a step in micro-batches, `in_flight` are underway at once: while one is at the server, the client works on
another. The client is the same object as in simulation. What it needs beyond one link of the job chain, the
moments of its optimizer, it keeps on its own disk. A refusal or a fault of its own in a round costs it that
round: it goes on asking, and does nothing until it is told where the run is when the next one begins.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from splitft.deploy.flight import Pipeline
from splitft.deploy.requests import LANES, RequestChannel
from splitft.deploy.site.optimizer_store import OptimizerStore
from splitft.deploy.site.policy import SitePolicy
from splitft.deploy.transport import Transport
from splitft.errors import CarrierError, ForbiddenError, ProtocolError, SplitftError
from splitft.protocol import (
    AdapterUpload,
    Declined,
    EndSession,
    Evaluate,
    GlobalAdapters,
    Heartbeat,
    Join,
    LastHidden,
    Message,
    MessageSerializer,
    Next,
    Refused,
    Register,
    RoundReady,
    RoundStart,
    Stop,
    Train,
    Wait,
)
from splitft.protocol.codec_state import CodecState
from splitft.training.client import Client

ALIVE_LANE = LANES - 1
logger = logging.getLogger(__name__)


class RefusedError(ProtocolError):
    """The server refused what this site sent."""


class _StoppedError(Exception):
    """The round's time is up."""


class _LeftError(Exception):
    """The link has ended; says why."""


def decline(
    name: str,
    reason: str,
    carrier: Transport,
    link: bytes,
    terms: MessageSerializer,
    frame_limit: int,
    patience_s: float,
) -> None:
    """Tell the server that a site takes no part, and why. Raises CarrierError if it cannot be told."""
    logger.warning("%s declines: %s", name, reason)
    message = Declined(client=name, reason=reason[:2000])
    RequestChannel(carrier, link, 0, frame_limit).ask(terms.to_bytes(message), patience_s)


class SiteSession:
    """One site in one link of the chain."""

    def __init__(
        self,
        hello: Register,
        carrier: Transport,
        link: bytes,
        terms: MessageSerializer,
        frame_limit: int,
        open_client: Callable[[int], Client],
        keeping: OptimizerStore,
        patience_s: float,
        alive_every_s: float | None = None,
        seed: int = 0,
        guard: SitePolicy | None = None,
        in_flight: int = 1,
    ) -> None:
        """`open_client` makes the client at a cut; after `patience_s` without answer the server is gone.

        `guard` holds what its data owner forbids; `in_flight` micro-batches are underway at once.
        """
        self._guard = guard
        self._hello, self._terms, self._open = hello, terms, open_client
        self._name, self._keeping, self._patience_s = hello.client, keeping, patience_s
        self._alive_every_s = alive_every_s
        self._lane = RequestChannel(carrier, link, 0, frame_limit)
        others = [RequestChannel(carrier, link, number, frame_limit) for number in range(1, in_flight)]
        self._flight = Pipeline((self._lane, *others), patience_s)
        self._alive = RequestChannel(carrier, link, ALIVE_LANE, frame_limit)
        self._client: Client | None = None
        self._knows = False  # where the run is
        self._streams = CodecState(seed, self._name)

    def run(self) -> str:
        """Take part until the link ends; returns why it did. Raises CarrierError if the server is gone."""
        with self._signs_of_life():
            try:
                self._take_part()
            except _LeftError as left:
                return str(left)
            finally:
                self._flight.close()

    def _take_part(self) -> NoReturn:
        order = self._ask(self._hello)
        while True:
            try:
                order = self._ask(self._do(order))
            except _StoppedError:
                order = self._ask(self._kept(self._known().upload()))
            except CarrierError:
                raise
            except ForbiddenError as error:
                logger.warning("%s declines: %s", self._name, error)
                self._ask(Declined(client=self._name, reason=str(error)[:2000]))
                raise _LeftError(f"it declined: {error}") from error
            except SplitftError as error:
                logger.warning("%s is out of this round: %s", self._name, error)
                self._knows = False
                if not isinstance(error, RefusedError):
                    time.sleep(1.0)
                order = self._ask(Next(client=self._name))

    # ----------------------------------------------------------------------------------------------

    def _do(self, order: Message) -> Message:
        """Do what the server asks; returns what to tell it."""
        asks = Next(client=self._name)
        if isinstance(order, Wait | Stop):
            return asks
        if isinstance(order, Refused):
            raise RefusedError(f"{order.error}: {order.reason}")
        if isinstance(order, Join):
            self._join(order)
            return asks
        client = self._known()
        if isinstance(order, RoundStart):
            if self._guard is not None:
                self._guard.move(order.cut)
            return self._kept(client.start(order))
        if isinstance(order, Train):
            for _ in range(order.steps):
                self._step(client)
            return self._kept(client.upload())
        if isinstance(order, GlobalAdapters):
            client.install(order)
            return asks
        if isinstance(order, Evaluate):
            for index in range(client.held_out_batches):
                client.held_out_head(self._reply(client.held_out(index)))
            return client.evaluation()
        raise ProtocolError(f"{type(order).__name__} is no order")

    def _join(self, order: Join) -> None:
        """Take up the run where it is."""
        if self._guard is not None:
            self._guard.join(order.cut, order.manifest)
        if self._client is None:
            self._client = self._open(order.cut)
        moments = self._keeping.moments_of(order.round, order.cut, order.steps)
        self._client.join(order, moments)
        self._knows = True
        logger.info("%s joins after round %d with cut %d", self._name, order.round, order.cut)

    def _kept(self, word: RoundReady | AdapterUpload) -> RoundReady | AdapterUpload:
        """The word that it has moved, or has trained, once that is on disk."""
        client = self._known()
        self._keeping.keep(word.round, client.plan.cut, *client.kept())
        return word

    def _step(self, client: Client) -> None:
        """One step: the next micro-batch leaves whenever a lane is free, and the oldest answer is next."""
        try:
            self._send(client.forward())
            while self._flight or client.unsent:
                while client.unsent and not self._flight.full:
                    self._send(client.forward())
                reply = _step_of(self._read(self._flight.answer()))
                if isinstance(reply, LastHidden):
                    self._send(client.head(reply))
                else:
                    client.backward(reply)
        finally:
            self._flight.settle()

    def _send(self, message: Message) -> None:
        self._flight.ask(self._terms.to_bytes(message, self._streams))

    def _reply(self, message: Message) -> Message:
        """The answer to a held-out batch; raises if there is none."""
        return _step_of(self._ask(message))

    def _ask(self, message: Message) -> Message:
        """The answer to a message. Raises _LeftError if it is that the link has ended."""
        return self._read(self._lane.ask(self._terms.to_bytes(message, self._streams), self._patience_s))

    def _read(self, data: bytes) -> Message:
        answer = self._terms.from_bytes(data, streams=self._streams)
        if isinstance(answer, EndSession):
            raise _LeftError(answer.reason)
        return answer

    def _known(self) -> Client:
        if self._client is None or not self._knows:
            raise ProtocolError(f"{self._name}: an order came before Join")
        return self._client

    @contextmanager
    def _signs_of_life(self) -> Iterator[None]:
        """Say `Heartbeat` now and then, so that a slow site is not taken for a lost one."""
        done = threading.Event()

        def speak(every_s: float) -> None:
            alive = self._terms.to_bytes(Heartbeat(client=self._name))
            while not done.wait(every_s):
                try:
                    self._alive.ask(alive, self._patience_s)
                except SplitftError as error:
                    logger.info("%s: no sign of life got through: %s", self._name, error)

        thread = None
        if self._alive_every_s is not None:
            thread = threading.Thread(target=speak, args=(self._alive_every_s,), daemon=True)
            thread.start()
        try:
            yield
        finally:
            done.set()


def _step_of(reply: Message) -> Message:
    """The answer to a step; raises if there is none."""
    if isinstance(reply, Stop):
        raise _StoppedError
    if isinstance(reply, Refused):
        raise RefusedError(f"{reply.error}: {reply.reason}")
    return reply
