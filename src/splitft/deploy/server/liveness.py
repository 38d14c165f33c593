"""Who is there, in one link of a deployed run: lost when silent, refused for what cannot be, back when heard.

there --silence, or what cannot be--> out --heard again--> back, and told where the run is
  +---------- its data owner forbids what is asked ------> declined, until the next link
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Literal

from splitft.deploy.server.inbox import Inbox
from splitft.errors import SplitftError
from splitft.tracking.events import Listener, SiteChanged

logger = logging.getLogger(__name__)


class Liveness:
    """The sites of one link, and what became of them."""

    def __init__(
        self, desk: Inbox, silence_s: float, number: int, listener: Listener, dropped: Callable[[str], None]
    ) -> None:
        """Begin after round `number`, with everybody there; `dropped` hears of everyone who is out."""
        self._desk, self._silence_s, self._listener, self._dropped = desk, silence_s, listener, dropped
        self.number = number
        """The round that is underway."""
        self.stale = set(desk.sites)
        """Who does not know where the run is."""
        self.out: set[str] = set()
        """Lost, and not heard since."""
        self._declined: set[str] = set()  # whose data owner forbids what is asked

    def lose_silent(self, names: Iterable[str]) -> None:
        """Lose those of whom nothing was heard for too long."""
        for name in sorted(names):
            silence = self._desk.silence_s(name)
            if silence > self._silence_s:
                since = "ever" if silence == float("inf") else f"for {silence:.0f} s"
                self.lose(name, f"nothing was heard of it {since}")

    def decline(self, site: str, reason: str) -> None:
        """A site's data owner forbids what is asked: it takes no part in this link any more."""
        if site not in self._declined:
            self._declined.add(site)
            self._drop(site)
            self.note(site, "declined", reason)
            logger.warning("%s declines: %s", site, reason)

    def reachable(self, names: Iterable[str]) -> list[str]:
        """Those of whom something was heard lately; who was lost is back with that."""
        there = []
        for name in names:
            if name in self._declined:
                continue
            if self._desk.silence_s(name) > self._silence_s:
                if name not in self.out and name not in self.stale:
                    self.lose(name, "nothing was heard of it")
                continue
            if name in self.out:
                self.out.discard(name)
                self.note(name, "back", "it was heard again, and is told where the run is")
            there.append(name)
        return there

    def lose(self, site: str, reason: str) -> None:
        """A site is out until it is heard again."""
        self._drop(site)
        self.note(site, "lost", reason)

    def refuse(self, site: str, error: SplitftError) -> None:
        """A site has sent what cannot be: it is out until the next round."""
        if site not in self.out:
            self._drop(site)
            self.note(site, "refused", f"{type(error).__name__}: {error}")

    def _drop(self, site: str) -> None:
        if site in self._desk.sites:
            self._dropped(site)
            self._desk.withdraw(site)
            self.out.add(site)
            self.stale.add(site)

    def note(
        self, site: str, state: Literal["lost", "refused", "late", "back", "declined"], reason: str
    ) -> None:
        """Tell the run of it."""
        self._listener(SiteChanged(round=self.number, site=site, state=state, reason=reason))
