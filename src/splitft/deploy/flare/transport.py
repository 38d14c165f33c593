"""Our messages as requests between FLARE's job cells: bytes up, bytes back, on a channel of our own.

    site's job cell --request(bytes)--> server (checks the sender's token) --> server's job cell
                    <--reply(bytes)---

A request that is not answered in time is sent again under the same number (`envelope`), so a lost connection
costs nothing but time. FLARE's own ReliableMessage does the same, with three more messages for each of ours:
a step of 1 MB takes 7 ms this way and 23 ms that way. The payload is `bytes` and stays so: FLARE puts no
encoding of its own around it, and what comes as anything else is not answered.

Who sends is what the certificates say: FLARE's server lets nothing pass whose signed token does not fit the
connection that it came over, and the origin of a request is that connection's site.
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

from splitft.deploy.flare.times import TRY_S
from splitft.deploy.transport import Answer
from splitft.errors import CarrierError, DeployError

CHANNEL, TOPIC = "splitft", "ask"

logger = logging.getLogger(__name__)


class FlareCarrier:
    """The site's side. Implements `deploy.carrier.Carrier`."""

    def __init__(self, fl_ctx: FLContext, abort_signal: Signal) -> None:
        self._cell, self._abort = fl_ctx.get_engine().get_cell(), abort_signal
        self._server = FQCN.join([FQCN.ROOT_SERVER, fl_ctx.get_job_id()])

    def ask(self, data: bytes, within_s: float) -> bytes:
        """Carry the message to the server's job and bring back its answer."""
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
            raise CarrierError(f"the server did not answer: {code}")
        return bytes(reply.payload)


class FlareAnswers:
    """The server's side: hands on every message, with the site that its connection belongs to."""

    def __init__(self, fl_ctx: FLContext) -> None:
        self._answer: Answer | None = None
        self._job = fl_ctx.get_job_id()
        fl_ctx.get_engine().get_cell().register_request_cb(channel=CHANNEL, topic="*", cb=self._handle)

    def open(self, answer: Answer) -> None:
        """From now on, answer."""
        self._answer = answer

    def _handle(self, request: Any) -> Any:
        origin = FQCN.split(str(request.get_header(MessageHeaderKey.ORIGIN) or ""))
        if len(origin) < 2 or origin[-1] != self._job:
            logger.warning("a message from %s, which is no site of this job, is not answered", origin)
            return make_reply(ReturnCode.UNAUTHENTICATED)
        if not isinstance(request.payload, bytes | bytearray | memoryview):
            logger.warning("a %s from %s is not answered", type(request.payload).__name__, origin[-2])
            return make_reply(ReturnCode.INVALID_REQUEST)
        if self._answer is None:
            return make_reply(ReturnCode.SERVICE_UNAVAILABLE)
        try:
            data = self._answer(origin[-2], bytes(request.payload))
        except CarrierError:
            return make_reply(ReturnCode.SERVICE_UNAVAILABLE)  # not ready yet: it asks again
        return make_reply(ReturnCode.OK, body=data)
