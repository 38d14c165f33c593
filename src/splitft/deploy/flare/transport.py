"""Carry messages as requests between FLARE's job cells: bytes up, bytes back, on a cell channel of our own.

    site's job cell --request(bytes)--> server (checks the sender's token) --> server's job cell
                    <--reply(bytes)---

A request without a reply in time is sent again under its number (`requests`), so a lost connection costs only
time. FLARE's own ReliableMessage does the same with three more messages for each of ours: a step of 1 MB
takes 7 ms this way and 23 ms that way. Payloads are `bytes`, which FLARE does not encode; others are not
answered.

The sender is certified: FLARE's server passes on only messages whose signed token fits the connection that
they came over, and the origin of a request is that connection's site.
"""

from __future__ import annotations

import logging
from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.apis.signal import Signal
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.fuel.f3.message import Message

from splitft.deploy.requests import Answer
from splitft.errors import DeployError, TransportError
from splitft.foreign_text import printable

CHANNEL, TOPIC = "splitft", "ask"
TRY_S = 8.0
"""A request without a reply after this long is sent again; a short network failure costs that. It must be
longer than `inbox.HOLD_S`, for which the server may keep a request, and than a large message takes."""

logger = logging.getLogger(__name__)


class FlareTransport:
    """The site's side. Implements `requests.Transport`."""

    def __init__(self, fl_ctx: FLContext, abort_signal: Signal) -> None:
        self._cell, self._abort = fl_ctx.get_engine().get_cell(), abort_signal
        self._server = FQCN.join([FQCN.ROOT_SERVER, fl_ctx.get_job_id()])

    def ask(self, data: bytes, within_s: float) -> bytes:
        """Carry the message to the server's job and return its reply."""
        if self._abort.triggered:
            raise DeployError("the job was stopped")
        reply = self._cell.send_request(
            channel=CHANNEL,
            topic=TOPIC,
            target=self._server,
            request=Message(payload=data),
            timeout=min(within_s, TRY_S),
            abort_signal=self._abort,
        )
        code = reply.get_header(MessageHeaderKey.RETURN_CODE)
        if code != ReturnCode.OK or not isinstance(reply.payload, bytes | bytearray | memoryview):
            raise TransportError(f"the server did not answer: {printable(str(code))}")
        return bytes(reply.payload)


class FlareAnswers:
    """The server's side: passes on every message with the name of the site that sent it."""

    def __init__(self, fl_ctx: FLContext) -> None:
        self._answer: Answer | None = None
        self._job = fl_ctx.get_job_id()
        fl_ctx.get_engine().get_cell().register_request_cb(channel=CHANNEL, topic="*", cb=self._handle)

    def open(self, answer: Answer) -> None:
        """Answer messages from now on."""
        self._answer = answer

    def _handle(self, request: Any) -> Any:
        origin = FQCN.split(str(request.get_header(MessageHeaderKey.ORIGIN) or ""))
        if len(origin) < 2 or origin[-1] != self._job:
            who = printable(".".join(origin))
            logger.warning("a message from %s, which is no site of this job, is not answered", who)
            return make_reply(ReturnCode.UNAUTHENTICATED)
        if not isinstance(request.payload, bytes | bytearray | memoryview):
            kind, who = type(request.payload).__name__, printable(origin[-2])
            logger.warning("a %s from %s is not answered", kind, who)
            return make_reply(ReturnCode.INVALID_REQUEST)
        if self._answer is None:
            return make_reply(ReturnCode.SERVICE_UNAVAILABLE)
        try:
            data = self._answer(origin[-2], bytes(request.payload))
        except TransportError:
            return make_reply(ReturnCode.SERVICE_UNAVAILABLE)  # not ready yet: the site asks again
        return make_reply(ReturnCode.OK, body=data)
