"""Carry out the steps and held-out batches of a site: with the server, or alone where it has the whole model.

    with the server   forward, Activations --> LastHidden, head, HeadGradient --> CutGradient, backward
                                                                             --> Again: the same batch again
    alone             forward, head, backward, LocalStep --> Wait, while the next step is computed

`in_flight` micro-batches of a step are at the server at once, while the client works on another.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from splitft.deploy.requests import Pipeline
from splitft.deploy.site.connection import WorkClock
from splitft.errors import ProtocolError
from splitft.model.devices import synchronize
from splitft.protocol import (
    Activations,
    Again,
    HeadGradient,
    LastHidden,
    LocalStep,
    Message,
    Refused,
    Stop,
)
from splitft.training.client import Client

T = TypeVar("T")

MOST_AGAIN = 10
"""A server that asks for the same step again more often than this is not obeyed."""


class RefusedError(ProtocolError):
    """The server refused what this site sent."""


class StoppedError(Exception):
    """The round is over for this site."""


class SiteSteps:
    """The steps of one site in one session."""

    def __init__(
        self,
        pipeline: Pipeline,
        clock: WorkClock,
        write: Callable[[Message], bytes],
        read: Callable[[bytes], Message],
    ) -> None:
        """Send what `write` makes of messages over the pipeline; `read` reads the replies."""
        self._pipeline, self._clock, self._write, self._read = pipeline, clock, write, read
        self._seconds: defaultdict[str, float] = defaultdict(float)  # computed since the last step message

    def begin(self) -> None:
        """Begin the steps of a round."""
        self._seconds.clear()

    def close(self) -> None:
        """Send nothing more."""
        self._pipeline.close()

    def take(self, client: Client) -> None:
        """Take one step. Raises StoppedError if the round is over."""
        with self._draining():
            if client.whole:
                self._take_alone(client)
            else:
                self._take(client)

    def evaluate(self, client: Client, index: int, round: int) -> None:
        """Add a held-out batch to the client's result."""
        with self._draining():
            if client.whole:
                self._evaluate_alone(client, index, round)
            else:
                self._send(client.held_out.forward(index))
                client.held_out.head(self._reply())

    def settle(self) -> None:
        """Wait until the server has read all reports. Raises StoppedError if the round is over."""
        with self._draining():
            while self._pipeline:
                self._reply()

    @contextmanager
    def _draining(self) -> Iterator[None]:
        """Leave no request in flight if anything fails."""
        try:
            yield
        except BaseException:
            self._pipeline.drain()
            raise

    # --- with the server --------------------------------------------------------------------------

    def _take(self, client: Client) -> None:
        """Send a micro-batch whenever a channel is free, process the replies in order."""
        again = 0
        self._send(self._timed(client, "client_forward", client.forward))
        while self._pipeline or client.unsent:
            while client.unsent and not self._pipeline.full:
                self._send(self._timed(client, "client_forward", client.forward))
            reply = self._reply()
            if isinstance(reply, LastHidden):
                self._send(self._timed(client, "head", client.head, reply))
            elif isinstance(reply, Again):
                if (again := again + 1) > MOST_AGAIN:
                    raise ProtocolError(
                        f"{client.name}: the server asks for step {reply.step} again and again"
                    )
                self._send(client.repeat(reply))
            else:
                self._timed(client, "client_backward", client.backward, reply)

    def _timed(self, client: Client, leg: str, work: Callable[..., T], *arguments: Message) -> T:
        """Do one leg of a step, and add its seconds to those that the next step message reports."""
        began = time.perf_counter()
        result = work(*arguments)
        synchronize(client.segment.devices)
        self._seconds[leg] += time.perf_counter() - began
        return result

    # --- alone ------------------------------------------------------------------------------------

    def _take_alone(self, client: Client) -> None:
        """Take a step, and report it while the next is computed."""
        totals = self._timed(client, "client_step", client.step_alone)
        done = totals.event(client.name, {})
        self._report(
            LocalStep(
                client=client.name,
                round=done.round,
                step=done.step,
                training=True,
                sequences=done.examples,
                tokens=done.tokens,
                loss=done.loss,
                seconds=round(self._seconds.pop("client_step"), 6),
            )
        )

    def _evaluate_alone(self, client: Client, index: int, round: int) -> None:
        """Evaluate a held-out batch, and report its size; the loss of all goes with the result."""
        batch = client.held_out.alone(index)
        self._report(
            LocalStep(
                client=client.name,
                round=round,
                step=index,
                training=False,
                sequences=len(batch.lengths),
                tokens=batch.labelled_tokens,
            )
        )

    def _report(self, message: LocalStep) -> None:
        """Report a step that is taken; one that was taken before the server said stop is reported too."""
        stopped = False
        while self._pipeline.full:
            try:
                self._reply()
            except StoppedError:
                stopped = True
        self._send(message)
        if stopped:
            self.settle()

    # --- messages ---------------------------------------------------------------------------------

    def _send(self, message: Activations | HeadGradient | LocalStep) -> None:
        """Send a message of a step, with the seconds computed for it."""
        if not isinstance(message, LocalStep):
            seconds = {leg: round(spent, 6) for leg, spent in self._seconds.items()}
            self._seconds.clear()
            message = message.model_copy(update={"seconds": seconds})
        self._pipeline.send(self._write(message))

    def _reply(self) -> Message:
        """Return the next reply. Raises if the step was refused, or the round is over."""
        reply = self._read(self._clock.waiting(self._pipeline.reply))
        if isinstance(reply, Stop):
            raise StoppedError
        if isinstance(reply, Refused):
            raise RefusedError(f"{reply.error}: {reply.reason}")
        return reply
