"""Queue what has arrived from the sites, and hand it out in turns.

    transport's threads --add(Arrival | Fault)--> one queue for each site --take()--> server's thread
                                                  a a a a                             a b a c a a
                                                  b
                                                  c

Sites take turns, so what one of them sends in numbers does not stand before the messages of the others. A
site's faults are merged: one of them says that it is out of the round.
"""

from __future__ import annotations

import contextlib
from collections import deque
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from itertools import zip_longest

from splitft.errors import SplitftError
from splitft.protocol import Activations, HeadGradient, LocalStep, Message, Refused


@dataclass(frozen=True)
class Arrival:
    """A checked message that waits for its reply."""

    site: str
    message: Message
    stale: bool = False
    """True if it was sent before the site could know the run's state: a `Join` waits for it."""
    answer: Future[Message] = field(default_factory=Future)

    @property
    def is_step(self) -> bool:
        """True if it belongs to a training step or a held-out batch."""
        return isinstance(self.message, Activations | HeadGradient | LocalStep)

    def reply(self, message: Message) -> None:
        """Send the reply, unless the session has ended meanwhile."""
        with contextlib.suppress(InvalidStateError):
            self.answer.set_result(message)

    def refuse(self, error: SplitftError) -> None:
        """Tell the sender why its message is not processed."""
        self.reply(refusal(error))


@dataclass(frozen=True)
class Fault:
    """An invalid message, which has been refused."""

    site: str
    error: SplitftError


class ArrivalQueue:
    """What has arrived and was not taken yet, by site. Its user holds a lock."""

    def __init__(self) -> None:
        self._by_site: dict[str, deque[Arrival | Fault]] = {}

    def __len__(self) -> int:
        """Return the number of sites with something to take."""
        return len(self._by_site)

    def add(self, one: Arrival | Fault) -> None:
        """Queue a message or a fault; of a site's faults only the first."""
        own = self._by_site.setdefault(one.site, deque())
        if isinstance(one, Arrival) or not any(isinstance(other, Fault) for other in own):
            own.append(one)

    def take(self) -> list[Arrival | Fault]:
        """Return everything: the first of each site, then the second of each, and so on."""
        turns = zip_longest(*self._by_site.values())
        self._by_site = {}
        return [one for turn in turns for one in turn if one is not None]


def refusal(error: SplitftError) -> Refused:
    """Return the message that tells a site why its own is refused."""
    return Refused(error=type(error).__name__, reason=str(error)[:2000])
