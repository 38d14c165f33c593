"""Lines of sites that are cut in the middle of a round, and mended in a later one."""

from __future__ import annotations

import threading

from deploy.network import EVERYONE, kind_of
from splitft.errors import TransportError

BY_ROUND = [[2, 2, 2], [3, 1, 2], [3, 1, 2], [1, 3, 2]]


def moving(number, cuts):
    return dict(zip(EVERYONE, BY_ROUND[number - 1], strict=True))


class CutUntil:
    """Its line is cut before its n-th message of a kind, until somebody says otherwise."""

    def __init__(self, transport, kind, nth, mended):
        self._transport, self._kind, self._left, self._mended = transport, kind, nth, mended

    def ask(self, data, within_s):
        if self._left > 0:
            self._left -= kind_of(data) == self._kind
        was_cut = self._left <= 0
        if was_cut and not self._mended.is_set():
            raise TransportError("the network is cut")
        answer = self._transport.ask(data, within_s)
        if was_cut:  # not a heartbeat that was underway when the line was cut
            self._mended.heard.set()
        return answer


class Mended(threading.Event):
    """Set when a line may be mended; `heard` is set when its site was heard again."""

    def __init__(self):
        super().__init__()
        self.heard = threading.Event()


class Mending:
    """Lets a line be mended before its n-th message of a kind, and waits until its site is heard."""

    def __init__(self, transport, kind, nth, mended):
        self._transport, self._kind, self._left, self._mended = transport, kind, nth, mended

    def ask(self, data, within_s):
        self._left -= kind_of(data) == self._kind
        if self._left <= 0:
            self._mended.set()
            assert self._mended.heard.wait(20)
        return self._transport.ask(data, within_s)
