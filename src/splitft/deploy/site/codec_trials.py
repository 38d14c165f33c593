"""Choose a site's codecs on its own text: the trials of `run.codec_choice`, over the messages of a session.

TryCodec(codec) --> both ends begin anew in it      Activations --> LastHidden, for each held-out batch
"""

from __future__ import annotations

from collections.abc import Callable

from splitft.deploy.site.steps import RefusedError
from splitft.protocol import Activations, HeldOutLoss, LastHidden, Message, Refused, TryCodec, expect
from splitft.protocol.codec_state import CodecState
from splitft.run.codec_choice import EXACT


class TrialLine:
    """The connection of one site, as codecs are tried on it. Implements `run.codec_choice.Line`."""

    def __init__(
        self,
        name: str,
        ask: Callable[[Message], Message],
        use: Callable[[str, str], None],
        state: CodecState,
        between: Callable[[], None],
    ) -> None:
        """`ask` sends a message and returns the reply, `use` sets this side's codecs; `state` is its memory.

        `between` is called before each batch, and lets the data owner's pause take effect.
        """
        self._name, self._ask, self._use, self._state, self._between = name, ask, use, state, between

    def begin(self, hidden: str) -> None:
        """Begin anew at both ends, with this codec for hidden states and exact gradients."""
        self._reply(TryCodec(client=self._name, hidden=hidden))
        self._use(hidden, EXACT)

    def ask(self, sent: Activations) -> LastHidden | HeldOutLoss:
        """Send a held-out batch and return the server's reply. Raises RefusedError if it is refused."""
        self._between()
        return expect(self._reply(sent), LastHidden, HeldOutLoss)

    def learned(self, name: str) -> int:
        """Return the number of streams in which this end has learned; the other end learns in the same."""
        return self._state.learned(name)

    def _reply(self, message: Message) -> Message:
        reply = self._ask(message)
        if isinstance(reply, Refused):
            raise RefusedError(f"{reply.error}: {reply.reason}")
        return reply
