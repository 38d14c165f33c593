"""Take part in one session of a run: fetch an order, carry it out with the client, and answer.

    Register -> Join -> [ RoundStart -> Train -> AdapterUpload -> GlobalAdapters -> Evaluate ] -> EndSession

The client is the object of the simulation. `in_flight` micro-batches of a step are at the server at once,
while the client works on another. What the site needs beyond a session, the moments of its optimizer, it
keeps on its own disk. After a refusal or an error of its own the site is out of the round. It keeps asking,
and waits for the run's state (`Join`) with the next round.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable
from typing import NoReturn, TypeVar

from splitft.deploy.requests import Pipeline
from splitft.deploy.site.connection import Connection, WorkClock, heartbeats, reason_of
from splitft.deploy.site.optimizer_store import OptimizerStore
from splitft.deploy.site.policy import SitePolicy
from splitft.errors import ForbiddenError, ProtocolError, SplitftError, TransportError
from splitft.model.devices import synchronize
from splitft.protocol import (
    Activations,
    AdapterUpload,
    Declined,
    EndSession,
    Evaluate,
    GlobalAdapters,
    HeadGradient,
    Join,
    LastHidden,
    Message,
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

T = TypeVar("T")

AFTER_ERROR_S = 1.0
"""Pause after an error of this site's own."""
HURRIED_S = 0.1
"""A server that answers `Wait` sooner than this is asked again only after a pause of this length."""
MOST_FAILURES = 3
"""A site that could not complete so many rounds in a row leaves the session."""
logger = logging.getLogger(__name__)


class RefusedError(ProtocolError):
    """The server refused what this site sent."""


class _StoppedError(Exception):
    """The round is over for this site."""


class _SessionEndedError(Exception):
    """The session has ended; says why."""


class SiteSession:
    """One site's side of one session."""

    def __init__(
        self,
        register: Register,
        connection: Connection,
        open_client: Callable[[int], Client],
        store: OptimizerStore,
        policy: SitePolicy | None = None,
        check_paused: Callable[[], None] = lambda: None,
    ) -> None:
        """`open_client` makes the client at a cut; `policy` has what its data owner forbids.

        `check_paused` raises ForbiddenError when the data owner has paused the site; it is called before each
        order and each step.
        """
        self._register, self._name = register, register.client
        self._connection, self._serializer = connection, connection.serializer
        self._open_client, self._store, self._policy = open_client, store, policy
        self._check_paused = check_paused
        channels = [connection.channel(number) for number in range(connection.in_flight)]
        self._channel, self._steps = channels[0], Pipeline(channels, connection.patience_s)
        self._client: Client | None = None
        self._joined = False  # whether this site knows the run's state
        self._failures = 0  # since it has last completed an order
        self._codec_state = CodecState(connection.seed, self._name)
        self._clock = WorkClock()
        self._seconds: defaultdict[str, float] = defaultdict(float)  # computed since the last step message

    def run(self) -> str:
        """Take part until the session ends; returns why it did. Raises TransportError without a server."""
        with heartbeats(self._connection, self._name):
            try:
                self._take_part()
            except _SessionEndedError as ended:
                return str(ended)
            finally:
                self._steps.close()
                if self._policy is not None:
                    self._account(self._policy)
                    self._policy.limits.close()

    def _take_part(self) -> NoReturn:
        order = self._ask(self._register)
        while True:
            try:
                order = self._ask(self._carry_out(order))
            except _StoppedError:
                order = self._ask(self._stored(self._joined_client().upload()))
            except (TransportError, _SessionEndedError):
                raise
            except ForbiddenError as error:
                self._decline(str(error))
            except RefusedError as error:
                logger.warning("%s is out of this round: %s", self._name, error)
                self._joined = False
                order = self._ask(Next(client=self._name))
            except Exception as error:  # such as a full disk, or too little memory: the server is told
                order = self._ask(self._failed(error))

    def _failed(self, error: Exception) -> Next:
        """Return the message that tells the server of a failure; the site is out of this round.

        Declines if it fails again and again.
        """
        reason = reason_of(error)
        known = isinstance(error, SplitftError | OSError)
        logger.warning(
            "%s is out of this round: %s", self._name, error if known else reason, exc_info=not known
        )
        self._joined, self._failures = False, self._failures + 1
        if self._failures >= MOST_FAILURES:
            self._decline(f"it failed {self._failures} times in a row: {reason}")
        time.sleep(AFTER_ERROR_S)
        return Next(client=self._name, failure=reason)

    def _decline(self, reason: str) -> NoReturn:
        """Tell the server that this site leaves the session, and why."""
        logger.warning("%s declines: %s", self._name, reason)
        self._ask(Declined(client=self._name, reason=reason[:2000]))
        raise _SessionEndedError(f"it declined: {reason}")

    # --- orders -----------------------------------------------------------------------------------

    def _carry_out(self, order: Message) -> Message:
        """Carry out an order; returns the message that answers it."""
        self._check_paused()
        done = Next(client=self._name)
        if isinstance(order, Wait | Stop):
            self._pause_if_hurried()
            return done
        if isinstance(order, Refused):
            raise RefusedError(f"{order.error}: {order.reason}")
        policy = self._policy
        if policy is not None:
            self._account(policy)
            policy.limits.check(order)
        if isinstance(order, Join):
            self._join(order)
            return done
        client = self._joined_client()
        if isinstance(order, RoundStart):
            if policy is not None:
                policy.check_move(order.cut)
            ready = client.start(order)
            self._check_adapters(client)
            return self._stored(ready)
        if isinstance(order, Train):
            self._seconds.clear()
            for _ in range(order.steps):
                self._step(client)
            return self._stored(client.upload())
        if isinstance(order, GlobalAdapters):
            client.install(order)
            self._check_adapters(client)
            return done
        if isinstance(order, Evaluate):
            return self._evaluate(client)
        raise ProtocolError(f"{type(order).__name__} is no order")

    def _evaluate(self, client: Client) -> Message:
        """Evaluate the adapters on the held-out text, batch by batch."""
        for index in range(len(client.held_out)):
            self._check_paused()
            client.held_out.head(_step_reply(self._ask(client.held_out.forward(index))))
            if self._policy is not None:
                self._account(self._policy)
        return client.held_out.result()

    def _check_adapters(self, client: Client) -> None:
        """Check adapters that were just received, before they are used."""
        if self._policy is not None:
            self._policy.limits.check_adapters(client)

    def _account(self, policy: SitePolicy) -> None:
        """Count the seconds since the last call in which this site did not wait for the server."""
        policy.limits.work(self._clock.worked_s())

    def _pause_if_hurried(self) -> None:
        """Wait for a moment if the server says to wait without having waited itself."""
        if self._clock.asked_s < HURRIED_S:
            self._clock.pause(HURRIED_S)

    def _join(self, order: Join) -> None:
        """Take over the run's state, with this site's own moments."""
        if self._policy is not None:
            self._policy.check_join(order.cut, order.manifest, order.tensors)
        self._store.check_text(order.round)
        if self._client is None:
            self._client = self._open_client(order.cut)
        self._client.join(order, self._store.load(order.round, order.cut, order.steps))
        self._check_adapters(self._client)
        self._joined = True
        logger.info("%s joins after round %d with cut %d", self._name, order.round, order.cut)

    def _stored(self, message: RoundReady | AdapterUpload) -> RoundReady | AdapterUpload:
        """Save the moments, then return the message that the client has moved or trained."""
        client = self._joined_client()
        self._store.save(message.round, client.plan.cut, *client.optimizer_state())
        if isinstance(message, AdapterUpload):
            self._failures = 0
        return message

    def _step(self, client: Client) -> None:
        """Take one step: send a micro-batch whenever a channel is free, process the replies in order."""
        self._check_paused()
        if self._policy is not None:
            self._account(self._policy)
        try:
            self._send(self._timed("client_forward", client.forward))
            while self._steps or client.unsent:
                while client.unsent and not self._steps.full:
                    self._send(self._timed("client_forward", client.forward))
                reply = _step_reply(self._read(self._clock.waiting(self._steps.reply)))
                if isinstance(reply, LastHidden):
                    self._send(self._timed("head", client.head, reply))
                else:
                    self._timed("client_backward", client.backward, reply)
        finally:
            self._steps.drain()

    def _timed(self, leg: str, work: Callable[..., T], *arguments: Message) -> T:
        """Do one leg of a step, and add its seconds to those that the next step message reports."""
        began = time.perf_counter()
        result = work(*arguments)
        synchronize(self._joined_client().segment.devices)
        self._seconds[leg] += time.perf_counter() - began
        return result

    def _joined_client(self) -> Client:
        if self._client is None or not self._joined:
            raise ProtocolError(f"{self._name}: an order came before Join")
        return self._client

    # --- messages ---------------------------------------------------------------------------------

    def _send(self, message: Activations | HeadGradient) -> None:
        """Send a step, with the seconds computed for it; its reply comes from `self._steps`."""
        seconds = {leg: round(spent, 6) for leg, spent in self._seconds.items()}
        self._seconds.clear()
        message = message.model_copy(update={"seconds": seconds})
        self._steps.send(self._serializer.to_bytes(message, self._codec_state))

    def _ask(self, message: Message) -> Message:
        """Send a message and return the reply. Raises _SessionEndedError if the session has ended."""
        data = self._serializer.to_bytes(message, self._codec_state)
        return self._read(self._clock.waiting(lambda: self._channel.ask(data, self._connection.patience_s)))

    def _read(self, data: bytes) -> Message:
        reply = self._serializer.from_bytes(data, state=self._codec_state)
        if isinstance(reply, EndSession):
            raise _SessionEndedError(reply.reason)
        return reply


def _step_reply(reply: Message) -> Message:
    """Return the reply to a step. Raises if the step was refused, or the round is over."""
    if isinstance(reply, Stop):
        raise _StoppedError
    if isinstance(reply, Refused):
        raise RefusedError(f"{reply.error}: {reply.reason}")
    return reply
