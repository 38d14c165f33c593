"""The federation of a deployed run, as `runtime.rounds` sees it: orders out, answers in.

    rounds --start, train, install, evaluate--> RemoteFederation --orders--> desk --> sites
                     server.forward, server.backward <--what arrived in a short window, in groups

A site may fall silent, be slow, or send what cannot be. Then it is out for the round and the others never
notice: what was not finished is forgotten, its own factors on the server with it. When it is heard again it
is told where the run is (`Join`) and takes part from the next round on. With too few sites left the round is
given up (PausedError), and the last finished round is where the run goes on.

Who is there is for `attendance` to know, and steps as they come for `stepping`; here are rounds, and waiting.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from splitft.adapters import AdapterState
from splitft.deploy.server.inbox import Arrival, Fault, Inbox
from splitft.deploy.server.liveness import Liveness
from splitft.deploy.server.steps import StepService, answer_refused, check_factors
from splitft.errors import AdapterError, PausedError, ProtocolError, SplitftError
from splitft.geometry import Span
from splitft.protocol import (
    Activations,
    AdapterUpload,
    BaseFile,
    Declined,
    Evaluate,
    Evaluation,
    GlobalAdapters,
    HeadGradient,
    Join,
    Message,
    Register,
    RoundReady,
    RoundStart,
    Train,
    expect,
)
from splitft.specs import DeploySpec
from splitft.tracking.events import Listener, StepDone, Traffic
from splitft.training.ranks import RankPolicy
from splitft.training.rounds import RunState
from splitft.training.server import Server

M = TypeVar("M", bound=Message)
TICK_S = 0.5
"""How often silence and deadlines are looked at."""


class RemoteFederation:
    """Carries rounds to the sites of one link. Implements `runtime.rounds.Federation`."""

    def __init__(
        self,
        desk: Inbox,
        server: Server,
        ranks: RankPolicy,
        spec: DeploySpec,
        state: RunState,
        steps: Mapping[str, int],
        listener: Listener,
        manifest: tuple[BaseFile, ...] = (),
    ) -> None:
        """Go on from `state`, of which no site knows yet; `manifest` is of the base model as it is here."""
        self._desk, self._server, self._ranks, self._spec = desk, server, ranks, spec
        self._manifest = manifest
        self._state = state
        self._moving: dict[str, int] = {}  # cuts of the round that is underway
        self._there = Liveness(desk, spec.silence_s, state.round, listener, self._dropped)
        self._stepping = StepService(desk, server, steps, self._there.refuse)

    @property
    def steps(self) -> dict[str, int]:
        """Optimizer steps of each site that count."""
        return self._stepping.steps

    def decline(self, site: str, reason: str) -> None:
        """A site's data owner forbids what is asked: it takes no part in this link any more."""
        self._there.decline(site, reason)

    # --- rounds -----------------------------------------------------------------------------------

    def start(self, messages: Mapping[str, RoundStart]) -> dict[str, RoundReady]:
        """Begin a round with those of these sites that are there."""
        self._there.number = next(iter(messages.values())).round
        self._moving = {name: message.cut for name, message in messages.items()}
        names = self._there.reachable(messages)
        for name in names:
            self._brief(name)
            self._desk.post(name, messages[name])

        def check(site: str, message: Message) -> RoundReady:
            expect(message, RoundReady, round=messages[site].round)
            assert isinstance(message, RoundReady)
            return message

        ready = self._collect(names, check, self._spec.join_s)
        self._need(ready)
        return ready

    def train(
        self, number: int, participants: Sequence[str], steps: int, listener: Callable[[StepDone], None]
    ) -> dict[str, AdapterUpload]:
        """The round's local steps; returns what those have learnt who finished, or were stopped in time."""
        self._stepping.begin(participants)
        for name in participants:
            self._desk.post(name, Train(round=number, steps=steps))

        def check(site: str, message: Message) -> AdapterUpload:
            expect(message, AdapterUpload, round=number)
            assert isinstance(message, AdapterUpload)
            if self._stepping.pending(site):
                raise ProtocolError(f"{site} sends its adapters, but its gradient was due")
            check_factors(site, message.adapters, self._state.adapters, self._moving[site], self._ranks)
            others, tokens = self._server.trained(site)
            if not others.all_finite():
                raise AdapterError(f"what the server trained for {site} is not finite")
            if not tokens:
                raise ProtocolError(f"{site} sends its adapters without having finished a step")
            return message

        uploads = self._collect(participants, check, None, lambda found: self._stepping.work(found, listener))
        self._need(uploads)
        self._stepping.settle(uploads)
        order = [name for name in participants if name in uploads]
        return {name: uploads[name] for name in order}

    def install(self, messages: Mapping[str, GlobalAdapters], state: RunState) -> None:
        """Hand out the aggregated factors; who is away gets them when it is back."""
        self._state = state
        for name, message in messages.items():
            if name not in self._there.stale:
                self._desk.post(name, message)

    def evaluate(self) -> dict[str, Evaluation]:
        """Held-out loss of every site that is there."""
        number = self._state.round
        names = self._there.reachable(self._state.cuts)
        for name in names:
            self._brief(name)
            self._desk.post(name, Evaluate(round=number))

        def check(site: str, message: Message) -> Evaluation:
            expect(message, Evaluation, round=number)
            assert isinstance(message, Evaluation)
            return message

        results = self._collect(names, check, None, self._stepping.try_out)
        self._need(results)
        return results

    def traffic(self) -> dict[str, Traffic]:
        """Bytes by site since this was asked last."""
        return self._desk.traffic()

    # --- waiting ----------------------------------------------------------------------------------

    def _collect(
        self,
        names: Iterable[str],
        check: Callable[[str, Message], M],
        within_s: float | None,
        work: Callable[[list[Arrival]], None] | None = None,
    ) -> dict[str, M]:
        """Wait until each of these has sent its last word, or is out; `work` answers what comes before."""
        waiting = set(names)
        found: dict[str, M] = {}
        seconds: list[float] = []
        stopped: dict[str, float] = {}
        began = time.monotonic()
        while waiting:
            if self._desk.closed:
                raise PausedError(f"the run was stopped in round {self._there.number}")
            steps = []
            for arrival in self._desk.take(self._spec.window_ms / 1000, TICK_S):
                if isinstance(arrival, Fault):
                    self._there.refuse(arrival.site, arrival.error)
                elif isinstance(arrival.message, Declined):
                    self.decline(arrival.site, arrival.message.reason)
                elif arrival.stale or isinstance(arrival.message, Register) or arrival.site not in waiting:
                    self._put_off(arrival)
                elif isinstance(arrival.message, Activations | HeadGradient):
                    if arrival.site in stopped:
                        self._stepping.stop(arrival, self._there.number)
                    else:
                        steps.append(arrival)
                else:
                    try:
                        found[arrival.site] = check(arrival.site, arrival.message)
                        seconds.append(time.monotonic() - began)
                        waiting.discard(arrival.site)
                    except SplitftError as error:
                        self._there.refuse(arrival.site, error)
                waiting -= self._there.out
            if steps and work is not None:
                work([one for one in steps if one.site in waiting])
            elif steps:
                for one in steps:
                    answer_refused(one, ProtocolError("no step is due"))
            waiting -= self._there.out
            self._there.lose_silent(waiting)
            waiting -= self._there.out
            spent = time.monotonic() - began
            if within_s is not None and spent > within_s:
                for name in waiting:
                    self._there.lose(name, f"it did not answer within {within_s:.0f} s")
                break
            for name in [one for one in waiting if spent - stopped.get(one, spent) > self._spec.patience_s]:
                self._there.lose(name, "it was stopped for being slow, and did not upload what it had")
            waiting -= self._there.out
            if within_s is None and spent > self._deadline_s(seconds, len(waiting)):
                for name in sorted(waiting - stopped.keys()):
                    stopped[name] = spent
                    self._there.note(
                        name, "late", f"{self._stepping.done.get(name, 0)} steps in {spent:.0f} s"
                    )
        return found

    def _deadline_s(self, seconds: Sequence[float], waiting: int) -> float:
        """When whoever is not done is stopped: by the clock given, or once half are done, by their median."""
        limits = [self._spec.round_s] if self._spec.round_s is not None else []
        if seconds and len(seconds) >= waiting:
            limits.append(max(self._spec.slack * statistics.median(seconds), self._spec.patience_s))
        return min(limits, default=float("inf"))

    def _put_off(self, arrival: Arrival) -> None:
        """What comes from a site that has no turn: steps are refused, the rest finds its order by itself."""
        if isinstance(arrival.message, Activations | HeadGradient):
            answer_refused(arrival, ProtocolError(f"{arrival.site} is not in this round"))

    # --- who is there -----------------------------------------------------------------------------

    def _brief(self, site: str) -> None:
        """Tell a site where the run is, if it does not know."""
        if site not in self._there.stale:
            return
        number, span = self._state.round, Span(0, self._state.cuts[site])
        held = self._state.adapters.within(span)
        self._desk.withdraw(site)
        self._desk.post(
            site,
            Join(
                round=number,
                cut=span.stop,
                steps=self.steps[site],
                adapters=self._ranks.part_sent(held) if number else AdapterState(),
                folded=self._state.folded.within(span),
                manifest=self._manifest,
            ),
        )
        self._there.stale.discard(site)

    def _need(self, answers: Mapping[str, object]) -> None:
        if len(answers) < self._spec.min_clients:
            raise PausedError(
                f"{len(answers)} sites are left in round {self._there.number}, deploy.min_clients asks for "
                f"{self._spec.min_clients}: the run pauses after round {self._state.round}"
            )

    def _dropped(self, site: str) -> None:
        self._server.leave(site)
        self._stepping.forget(site)
