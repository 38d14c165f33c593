"""Wait for the sites' answers, and keep account of which sites take part in the round.

    in --silent, too slow, or an invalid message--> out --heard again--> back, sent the run's state (`Join`)
    +------ its data owner forbids the run -------> declined, until the next session

A slow site is first stopped: it uploads what it has finished. A site that is out does not hold up the others,
nor does one that is stopped.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from splitft.deploy.server.arrivals import Arrival, Fault
from splitft.deploy.server.claims import unusable
from splitft.deploy.server.inbox import Inbox
from splitft.deploy.server.steps import StepService
from splitft.deploy.server.uptime import UPTIME
from splitft.errors import PausedError, ProtocolError, ReplicaError, SiteFailureError, SplitftError
from splitft.protocol import Declined, Message, Register
from splitft.specs import DeploySpec
from splitft.tracking.events import Listener, SiteChanged

M = TypeVar("M", bound=Message)
TICK_S = 0.5
"""Longest time between two looks at silence and deadlines."""

logger = logging.getLogger(__name__)


@dataclass
class _Collection(Generic[M]):
    """The answers that one order to several sites has to bring."""

    waiting: set[str]
    check: Callable[[str, Message], M]
    """Returns a valid answer. Raises a SplitftError for an invalid one."""
    steps: StepService | None
    """Serves steps that come before the answers."""
    answers: dict[str, M] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    """Time that each answer took."""
    stopped: dict[str, float] = field(default_factory=dict)
    """Slow sites, and the time at which they were stopped."""
    began: float = field(default_factory=UPTIME.now)

    @property
    def elapsed_s(self) -> float:
        return UPTIME.now() - self.began


class Liveness:
    """The sites of one session: which take part, and why others do not."""

    def __init__(
        self, inbox: Inbox, spec: DeploySpec, number: int, listener: Listener, dropped: Callable[[str], None]
    ) -> None:
        """Begin after round `number` with all sites; `dropped` is called with every site that is out."""
        self._inbox, self._spec, self._listener, self._dropped = inbox, spec, listener, dropped
        self.number = number
        """The current round."""
        self.stale = set(inbox.sites)
        """Sites that do not know the run's state."""
        self.out: set[str] = set()
        """Sites that were lost or refused, and have not been asked since."""
        self._declined: set[str] = set()

    # --- waiting for answers ----------------------------------------------------------------------

    def collect(
        self,
        names: Iterable[str],
        check: Callable[[str, Message], M],
        steps: StepService | None = None,
        within_s: float | None = None,
    ) -> dict[str, M]:
        """Wait until each of these sites has sent a valid answer or is out; returns the answers.

        Sites without an answer after `within_s` are lost. Without it, slow sites are stopped by the round's
        deadline. Raises PausedError if the session ends.
        """
        todo = _Collection(set(names), check, steps)
        while todo.waiting:
            if self._inbox.closed:
                raise PausedError(f"the run was stopped in round {self.number}")
            due = []
            for arrival in self._inbox.take(self._spec.window_ms / 1000, TICK_S):
                if isinstance(arrival, Fault):
                    self.refuse(arrival.site, arrival.error)
                elif self._is_due_step(arrival, todo):
                    due.append(arrival)
                todo.waiting -= self.out
            self._serve(due, todo)
            todo.waiting -= self.out
            self._lose_silent(todo.waiting)
            todo.waiting -= self.out
            if within_s is None:
                self._stop_slow(todo)
            elif todo.elapsed_s > within_s:
                for name in todo.waiting:
                    self._lose(name, f"it did not answer within {within_s:.0f} s")
                break
        return todo.answers

    def _is_due_step(self, arrival: Arrival, todo: _Collection[M]) -> bool:
        """Return whether an arrival is a step to serve; process it if it is anything else."""
        site, message = arrival.site, arrival.message
        is_step = arrival.is_step
        if isinstance(message, Declined):
            self.decline(site, message.reason)
        elif arrival.stale or site not in todo.waiting or isinstance(message, Register):
            if is_step:  # anything else is answered with the site's next order
                arrival.refuse(ProtocolError(f"{site} is not in this round"))
        elif is_step and todo.steps is not None and site in todo.stopped:
            todo.steps.stop(arrival, self.number)
        elif is_step:
            return True
        else:
            try:
                todo.answers[site] = todo.check(site, message)
                todo.seconds.append(todo.elapsed_s)
                todo.waiting.discard(site)
            except ReplicaError:
                raise  # a process of the server has ended, which is not the site's fault
            except SplitftError as error:
                self.refuse(site, error)
            except Exception as error:  # whatever its data have caused is this site's fault
                self.refuse(site, unusable(site, type(message).__name__, error))
        return False

    def _serve(self, arrivals: Sequence[Arrival], todo: _Collection[M]) -> None:
        """Process the steps of sites that are still awaited; refuse the others."""
        for one in arrivals:
            if todo.steps is None:
                one.refuse(ProtocolError("no step is due"))
            elif one.site not in todo.waiting:
                one.refuse(ProtocolError(f"{one.site} is not in this round"))
        if todo.steps is not None:
            todo.steps.serve([one for one in arrivals if one.site in todo.waiting])

    def _stop_slow(self, todo: _Collection[M]) -> None:
        """Stop sites after the round's deadline; lose those that do not upload after they were stopped."""
        elapsed = todo.elapsed_s
        for name in list(todo.waiting):
            if elapsed - todo.stopped.get(name, elapsed) > self._spec.patience_s:
                self._lose(name, "it was stopped for being slow, and did not upload what it had")
        todo.waiting -= self.out
        limits = [self._spec.round_s] if self._spec.round_s is not None else []
        if todo.seconds and len(todo.seconds) >= len(todo.waiting):  # half of the sites are done
            limits.append(max(self._spec.slack * statistics.median(todo.seconds), self._spec.patience_s))
        if elapsed > min(limits, default=float("inf")):
            slow = todo.waiting
        else:
            slow = todo.steps.queue.slow(self._spec) & todo.waiting if todo.steps else set()
        for name in sorted(slow - todo.stopped.keys()):
            todo.stopped[name] = elapsed
            done = 0
            if todo.steps is not None:
                done = todo.steps.done.get(name, 0)
                todo.steps.rest(name, self.number)
            self._note(name, "late", f"{done} steps in {elapsed:.0f} s")

    # --- which sites take part --------------------------------------------------------------------

    def reachable(self, names: Iterable[str]) -> list[str]:
        """Return the sites that were heard lately; a lost one among them is back."""
        found = []
        for name in names:
            if name in self._declined:
                continue
            if self._inbox.silence_s(name) > self._spec.silence_s:
                if name not in self.out and name not in self.stale:
                    self._lose(name, "nothing was heard of it")
                continue
            if name in self.out:
                self.out.discard(name)
                self._note(name, "back", "it was heard again, and is sent the run's state")
            found.append(name)
        return found

    def decline(self, site: str, reason: str) -> None:
        """Leave out a site whose data owner forbids the run, until the session ends."""
        if site not in self._declined:
            self._declined.add(site)
            self._drop(site)
            self._note(site, "declined", reason)
            logger.warning("%s declines: %s", site, reason)

    def refuse(self, site: str, error: SplitftError) -> None:
        """Leave out a site that has sent an invalid message or reports a failure, until the next round."""
        if site in self.out:
            return
        self._drop(site)
        if isinstance(error, SiteFailureError):
            self._note(site, "failed", str(error))
        else:
            self._note(site, "refused", f"{type(error).__name__}: {error}")

    def _lose_silent(self, names: Iterable[str]) -> None:
        silent = {name: self._inbox.silence_s(name) for name in sorted(names)}
        lost = {name: silence for name, silence in silent.items() if silence > self._spec.silence_s}
        every = [
            self._inbox.silence_s(name) for name in self._inbox.sites
        ]  # heartbeats come four times as often
        everyone = len(every) > 1 and min(every) > self._spec.silence_s / 2
        for name, silence in lost.items():
            since = "ever" if silence == float("inf") else f"for {silence:.0f} s"
            hint = ", nor of any other site: is the server connected?" if everyone else ""
            self._lose(name, f"nothing was heard of it {since}{hint}")

    def _lose(self, site: str, reason: str) -> None:
        """Leave out a site until it is heard again."""
        self._drop(site)
        self._note(site, "lost", reason)

    def _drop(self, site: str) -> None:
        if site in self._inbox.sites:
            self._dropped(site)
            self._inbox.withdraw(site)
            self.out.add(site)
            self.stale.add(site)

    def _note(
        self, site: str, state: Literal["lost", "refused", "failed", "late", "back", "declined"], reason: str
    ) -> None:
        self._listener(SiteChanged(round=self.number, site=site, state=state, reason=reason))
