"""Take part in one session of a run: fetch an order, carry it out with the client, and answer.

    Register -> Join -> [ RoundStart -> Train -> AdapterUpload -> GlobalAdapters -> Evaluate ] -> EndSession

The client is the object of the simulation; `steps` carries out its steps. What the site needs beyond a
session, the moments of its optimizer, it keeps on its own disk. After a refusal or an error of its own the
site is out of the round. It keeps asking, and waits for the run's state (`Join`) with the next round.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NoReturn

from splitft.deploy.requests import Pipeline
from splitft.deploy.site.codec_trials import TrialLine
from splitft.deploy.site.connection import Connection, WorkClock, heartbeats, reason_of
from splitft.deploy.site.policy import SitePolicy
from splitft.deploy.site.site_store import KeptState, SiteStore
from splitft.deploy.site.steps import RefusedError, SiteSteps, StoppedError
from splitft.errors import ForbiddenError, ProtocolError, SplitftError, TransportError
from splitft.model.devices import CPU
from splitft.protocol import (
    AdapterUpload,
    ChooseCodecs,
    CodecsChosen,
    Declined,
    EndSession,
    Evaluate,
    GlobalAdapters,
    Join,
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
from splitft.protocol.serializer import always
from splitft.run.codec_choice import choose_codecs, with_codecs
from splitft.training.client import Client

AFTER_ERROR_S = 1.0
"""Pause after an error of this site's own."""
HURRIED_S = 0.1
"""A server that answers `Wait` sooner than this is asked again only after a pause of this length."""
MOST_FAILURES = 3
"""A site that could not complete so many rounds in a row leaves the session."""
logger = logging.getLogger(__name__)


class _SessionEndedError(Exception):
    """The session has ended; says why."""


class SiteSession:
    """One site's side of one session."""

    def __init__(
        self,
        register: Register,
        connection: Connection,
        open_client: Callable[[int], Client],
        store: SiteStore,
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
        self._channel, self._clock = channels[0], WorkClock()
        pipeline = Pipeline(channels, connection.patience_s)
        self._steps = SiteSteps(pipeline, self._clock, self._write, self._read)
        self._client: Client | None = None
        self._joined = False  # whether this site knows the run's state
        self._failures = 0  # since it has last completed an order
        self._codec_state = CodecState(connection.seed, self._name)

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
            except StoppedError:
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
            self._steps.begin()
            for _ in range(order.steps):
                self._pause_between_steps()
                self._steps.take(client)
            self._steps.settle()
            return self._stored(client.upload())
        if isinstance(order, GlobalAdapters):
            client.install(order)
            self._check_adapters(client)
            return done
        if isinstance(order, ChooseCodecs):
            return self._choose_codecs(client)
        if isinstance(order, Evaluate):
            return self._evaluate(client, order.round)
        raise ProtocolError(f"{type(order).__name__} is no order")

    def _evaluate(self, client: Client, round: int) -> Message:
        """Evaluate the adapters on the held-out text, batch by batch."""
        self._steps.begin()
        for index in range(len(client.held_out)):
            self._pause_between_steps()
            self._steps.evaluate(client, index, round)
        self._steps.settle()
        return client.held_out.result()

    def _choose_codecs(self, client: Client) -> CodecsChosen:
        """Try codecs on the held-out text, and use those that fit from now on."""
        line = TrialLine(
            self._name, self._ask, self._use_codecs, self._codec_state, self._pause_between_steps
        )
        wire, reason = self._connection.serializer.wire, "the whole model is here: nothing is sent in steps"
        candidates = self._connection.candidates
        if client.whole:
            hidden, gradient = candidates.hidden[-1], candidates.gradient[-1]
        else:
            wire, reason = choose_codecs(client, line, wire, candidates)
            hidden, gradient = wire.hidden, wire.gradient
        self._use_codecs(hidden, gradient)
        logger.info("%s sends hidden states in %s, gradients in %s: %s", self._name, hidden, gradient, reason)
        return CodecsChosen(client=self._name, hidden=hidden, gradient=gradient, reason=reason)

    def _use_codecs(self, hidden: str, gradient: str) -> None:
        self._serializer = with_codecs(self._connection.serializer, hidden, gradient)

    def _pause_between_steps(self) -> None:
        """Let the data owner's pause and limits take effect."""
        self._check_paused()
        if self._policy is not None:
            self._account(self._policy)

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
        """Take over the run's state, with what this site has kept and the codecs that it has chosen."""
        if self._policy is not None:
            self._policy.check_join(order.cut, order.manifest, order.tensors)
        self._serializer = self._connection.serializer
        if order.hidden:
            self._connection.candidates.check(order.hidden, order.gradient)
            self._use_codecs(order.hidden, order.gradient)
        self._store.check_text(order.round)
        if self._client is None:
            self._client = self._open_client(order.cut)
        kept = self._store.load(order.round, order.cut, order.steps)
        self._client.join(order, kept.moments, kept.own)
        if order.steps and self._client.blocks.personal() and not kept.own:
            logger.warning(
                "%s keeps factors of its own in this run, but found none of its %d steps (a new disk, or a "
                "folder that was deleted): they begin again as before round 1",
                self._name,
                order.steps,
            )
        self._check_adapters(self._client)
        self._joined = True
        logger.info("%s joins after round %d with cut %d", self._name, order.round, order.cut)

    def _stored(self, message: RoundReady | AdapterUpload) -> RoundReady | AdapterUpload:
        """Save what this site keeps, then return the message that the client has moved or trained."""
        client, begun = self._joined_client(), isinstance(message, RoundReady)
        steps, moments = client.optimizer_state()
        state = KeptState(moments, client.blocks.personal())
        self._store.save(message.round, client.plan.cut, steps, state, begun=begun)
        if isinstance(message, AdapterUpload):
            self._failures = 0
        return message

    def _joined_client(self) -> Client:
        if self._client is None or not self._joined:
            raise ProtocolError(f"{self._name}: an order came before Join")
        return self._client

    # --- messages ---------------------------------------------------------------------------------

    def _write(self, message: Message) -> bytes:
        return self._serializer.to_bytes(message, self._codec_state)

    def _ask(self, message: Message) -> Message:
        """Send a message and return the reply. Raises _SessionEndedError if the session has ended."""
        data = self._write(message)
        return self._read(self._clock.waiting(lambda: self._channel.ask(data, self._connection.patience_s)))

    def _read(self, data: bytes) -> Message:
        place = always(CPU if self._client is None else self._client.segment.device)
        reply = self._serializer.from_bytes(data, state=self._codec_state, place=place)
        if isinstance(reply, EndSession):
            raise _SessionEndedError(reply.reason)
        return reply
