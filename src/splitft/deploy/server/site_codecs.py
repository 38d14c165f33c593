"""The codecs of one site at the server: what they remember, and which they are with `wire: auto`.

    ChooseCodecs --> TryCodec(int4) --> held-out batches in int4 --> TryCodec(int8) --> ... CodecsChosen

The site chooses, on its own text (`run.codec_choice`); here its messages are read and written in the codec
that it tries or has chosen. It can do neither unless it was asked to, and has the run's candidates alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from splitft.deploy.server.claims import HeldOutCount, SiteLimits, sequences_of
from splitft.errors import ProtocolError
from splitft.protocol import (
    Activations,
    CodecsChosen,
    LocalStep,
    Message,
    MessageSerializer,
    TryCodec,
    expect,
)
from splitft.protocol.codec_state import CodecState
from splitft.protocol.frame import Frame
from splitft.protocol.serializer import Place, ReceivedMessage
from splitft.run.codec_choice import EXACT, HIDDEN, check_choice, check_trial, with_codecs

MOST_TRIALS = len(HIDDEN) + 3
"""Times that a site may send its held-out text to choose codecs: exactly for gradients, exactly and perturbed
for hidden states, and in each candidate."""


class SiteCodecs:
    """Reads and writes the messages of one site. Its channels have threads of their own."""

    def __init__(self, serializer: MessageSerializer, seed: int, site: str) -> None:
        self._given = self._serializer = serializer
        self._state, self._lock = CodecState(seed, site), Lock()

    def use(self, hidden: str, gradient: str) -> None:
        """Use these codecs of hidden states and gradients from now on."""
        self._serializer = with_codecs(self._given, hidden, gradient)

    def receive(
        self, frame: bytes, limit: int, check: Callable[[Message], None], place: Place, choosing: bool
    ) -> ReceivedMessage:
        """Read a message; `choosing` if the site was asked to choose its codecs. Raises WireError."""
        with self._lock:
            received = self._serializer.receive(frame, limit, check, self._state, place)
            message = received.message
            if isinstance(message, TryCodec | CodecsChosen):
                if not choosing:
                    raise ProtocolError(f"{message.client} was not asked to choose its codecs")
                if isinstance(message, TryCodec):
                    check_trial(message.hidden, self._given.wire)
                    self.use(message.hidden, EXACT)
                else:
                    check_choice(message.hidden, message.gradient, self._given.wire)
                    self.use(message.hidden, message.gradient)
            return received

    def pack(self, reply: Message) -> Frame:
        """Return the frame of a reply. Raises a SplitftError if it may not be sent."""
        with self._lock:
            return self._serializer.pack(reply, self._state)


@dataclass
class TrialCount(HeldOutCount):
    """The held-out batches of one site that tries codecs on them: in any order, and several times each."""

    def check(self, message: Activations | LocalStep, round: int, limits: SiteLimits | None) -> None:
        """Raise ProtocolError if a batch is none of held-out text, or more than all trials need."""
        expect(message, Activations, round=round)
        sequences = self.sequences + sequences_of(message)
        if limits is not None and sequences > MOST_TRIALS * limits.held_out:
            raise ProtocolError(
                f"{message.client} tries codecs on {sequences} sequences; it registered {limits.held_out}"
            )
