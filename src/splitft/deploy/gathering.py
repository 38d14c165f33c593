"""The federation of a deployed run, as `runtime.rounds` sees it: orders out, answers in.

    rounds --start, train, install, evaluate--> Gathering --orders--> desk --> sites
                     server.forward, server.backward <--what arrived in a short window, in groups

A site may fall silent, be slow, or send what cannot be. Then it is out for the round and the others never
notice: what was not finished is forgotten, its own factors on the server with it. When it is heard again it
is told where the run is (`Join`) and takes part from the next round on. With too few sites left the round is
given up (PausedError), and the last finished round is where the run goes on.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from splitft.adapters import AdapterState
from splitft.deploy.desk import Arrival, Desk, Fault
from splitft.errors import AdapterError, PausedError, ProtocolError, SplitftError
from splitft.geometry import Span
from splitft.protocol import (
    Activations,
    AdapterUpload,
    BaseFile,
    CutGradient,
    Declined,
    Evaluate,
    Evaluation,
    GlobalAdapters,
    HeadGradient,
    Hello,
    Join,
    Message,
    Refused,
    RoundReady,
    RoundStart,
    Stop,
    Train,
    expect,
)
from splitft.runtime.ranks import Ranks
from splitft.runtime.rounds import RunState
from splitft.runtime.server import Server
from splitft.specs import DeploySpec
from splitft.tracking.events import Listener, SiteChanged, StepDone, Traffic

M = TypeVar("M", bound=Message)
TICK_S = 0.5
"""How often silence and deadlines are looked at."""

logger = logging.getLogger(__name__)


@dataclass
class _Underway:
    """One site's step between its hidden states and its gradient."""

    message: Activations
    began: float
    seconds: dict[str, float] = field(default_factory=dict)


class Gathering:
    """Carries rounds to the sites of one link. Implements `runtime.rounds.Federation`."""

    def __init__(
        self,
        desk: Desk,
        server: Server,
        ranks: Ranks,
        spec: DeploySpec,
        state: RunState,
        steps: Mapping[str, int],
        listener: Listener,
        manifest: tuple[BaseFile, ...] = (),
    ) -> None:
        """Go on from `state`, of which no site knows yet; `manifest` is of the base model as it is here."""
        self._desk, self._server, self._ranks, self._spec = desk, server, ranks, spec
        self._listener, self._manifest = listener, manifest
        self.steps = dict.fromkeys(desk.sites, 0) | dict(steps)
        """Optimizer steps of each site that count."""
        self._state = state
        self._number = state.round  # the round that is underway
        self._moving: dict[str, int] = {}  # cuts of the round that is underway
        self._global = state.adapters  # whose shapes every upload is held against
        self._stale = set(desk.sites)  # who does not know where the run is
        self._out: set[str] = set()  # lost, and not heard since
        self._declined: set[str] = set()  # whose data owner forbids what is asked
        self._done: dict[str, int] = {}  # steps finished in this round
        self._underway: dict[str, _Underway] = {}

    # --- rounds -----------------------------------------------------------------------------------

    def start(self, messages: Mapping[str, RoundStart]) -> dict[str, RoundReady]:
        """Begin a round with those of these sites that are there."""
        self._number = next(iter(messages.values())).round
        self._moving = {name: message.cut for name, message in messages.items()}
        names = self._reachable(messages)
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
        self._done, self._underway = dict.fromkeys(participants, 0), {}
        for name in participants:
            self._desk.post(name, Train(round=number, steps=steps))

        def check(site: str, message: Message) -> AdapterUpload:
            expect(message, AdapterUpload, round=number)
            assert isinstance(message, AdapterUpload)
            if site in self._underway:
                raise ProtocolError(f"{site} sends its adapters, but its gradient was due")
            self._check_factors(site, message.adapters)
            others, tokens = self._server.trained(site)
            if not others.all_finite():
                raise AdapterError(f"what the server trained for {site} is not finite")
            if not tokens:
                raise ProtocolError(f"{site} sends its adapters without having finished a step")
            return message

        uploads = self._collect(participants, check, None, lambda found: self._work(found, listener))
        self._need(uploads)
        for name in uploads:
            self.steps[name] += self._done[name]
        order = [name for name in participants if name in uploads]
        return {name: uploads[name] for name in order}

    def install(self, messages: Mapping[str, GlobalAdapters]) -> None:
        """Hand out the aggregated factors; who is away gets them when it is back."""
        whole = AdapterState()
        for message in messages.values():
            whole = whole.updated(message.adapters)
        cuts = {**self._state.cuts, **self._moving}
        self._state = RunState(self._number, cuts, self._state.adapters.updated(whole))
        for name, message in messages.items():
            if name not in self._stale:
                self._desk.post(name, message)

    def evaluate(self) -> dict[str, Evaluation]:
        """Held-out loss of every site that is there."""
        number = self._state.round
        names = self._reachable(self._state.cuts)
        for name in names:
            self._brief(name)
            self._desk.post(name, Evaluate(round=number))

        def check(site: str, message: Message) -> Evaluation:
            expect(message, Evaluation, round=number)
            assert isinstance(message, Evaluation)
            return message

        results = self._collect(names, check, None, self._try)
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
                raise PausedError(f"the run was stopped in round {self._number}")
            steps = []
            for arrival in self._desk.take(self._spec.window_ms / 1000, TICK_S):
                if isinstance(arrival, Fault):
                    self._refuse(arrival.site, arrival.error)
                elif isinstance(arrival.message, Declined):
                    self.decline(arrival.site, arrival.message.reason)
                elif arrival.stale or isinstance(arrival.message, Hello) or arrival.site not in waiting:
                    self._put_off(arrival)
                elif isinstance(arrival.message, Activations | HeadGradient):
                    if arrival.site in stopped:
                        self._stop(arrival)
                    else:
                        steps.append(arrival)
                else:
                    try:
                        found[arrival.site] = check(arrival.site, arrival.message)
                        seconds.append(time.monotonic() - began)
                        waiting.discard(arrival.site)
                    except SplitftError as error:
                        self._refuse(arrival.site, error)
                waiting -= self._out
            if steps and work is not None:
                work([one for one in steps if one.site in waiting])
            elif steps:
                for one in steps:
                    self._answer_refused(one, ProtocolError("no step is due"))
            waiting -= self._out
            self._lose_silent(waiting)
            waiting -= self._out
            spent = time.monotonic() - began
            if within_s is not None and spent > within_s:
                for name in waiting:
                    self._lose(name, f"it did not answer within {within_s:.0f} s")
                break
            for name in [one for one in waiting if spent - stopped.get(one, spent) > self._spec.patience_s]:
                self._lose(name, "it was stopped for being slow, and did not upload what it had")
            waiting -= self._out
            if within_s is None and spent > self._deadline_s(seconds, len(waiting)):
                for name in sorted(waiting - stopped.keys()):
                    stopped[name] = spent
                    self._note(name, "late", f"{self._done.get(name, 0)} steps in {spent:.0f} s")
        return found

    def _deadline_s(self, seconds: Sequence[float], waiting: int) -> float:
        """When whoever is not done is stopped: by the clock given, or once half are done, by their median."""
        limits = [self._spec.round_s] if self._spec.round_s is not None else []
        if seconds and len(seconds) >= waiting:
            limits.append(max(self._spec.slack * statistics.median(seconds), self._spec.patience_s))
        return min(limits, default=float("inf"))

    def _stop(self, arrival: Arrival) -> None:
        """The round's time is up for this site; its step underway is forgotten on both sides."""
        self._server.forget(arrival.site)
        self._underway.pop(arrival.site, None)
        arrival.reply(Stop(round=self._number))

    def _put_off(self, arrival: Arrival) -> None:
        """What comes from a site that has no turn: steps are refused, the rest finds its order by itself."""
        if isinstance(arrival.message, Activations | HeadGradient):
            self._answer_refused(arrival, ProtocolError(f"{arrival.site} is not in this round"))

    def _lose_silent(self, names: Iterable[str]) -> None:
        for name in sorted(names):
            silence = self._desk.silence_s(name)
            if silence > self._spec.silence_s:
                since = "ever" if silence == float("inf") else f"for {silence:.0f} s"
                self._lose(name, f"nothing was heard of it {since}")

    # --- steps ------------------------------------------------------------------------------------

    def _work(self, arrivals: list[Arrival], listener: Callable[[StepDone], None]) -> None:
        """All steps that have come: forwards in groups of like lengths, backwards as they were grouped."""
        here = {one.site: one for one in arrivals if self._accept(one)}
        forwards = [one.message for one in here.values() if isinstance(one.message, Activations)]
        backwards = [one.message for one in here.values() if isinstance(one.message, HeadGradient)]
        for group in self._server.groups(forwards):
            began = time.monotonic()
            replies = self._server.forward(group)
            share = (time.monotonic() - began) / len(group)
            for message in group:
                step = self._underway[message.client] = _Underway(message, began)
                step.seconds["server_forward"] = share
                reply = replies[message.client]
                if isinstance(reply, CutGradient):
                    self._finish(message.client, reply.loss or 0.0, listener)
                here[message.client].reply(reply)
        for gradients in self._server.together(backwards):
            began = time.monotonic()
            at_cuts = self._server.backward(gradients)
            share = (time.monotonic() - began) / len(gradients)
            for gradient in gradients:
                self._underway[gradient.client].seconds["server_backward"] = share
                self._finish(gradient.client, gradient.loss, listener)
                here[gradient.client].reply(at_cuts[gradient.client])

    def _finish(self, site: str, loss: float, listener: Callable[[StepDone], None]) -> None:
        """A step is taken on the server's side; the site takes it when it has the answer."""
        step = self._underway.pop(site)
        listener(
            StepDone(
                round=step.message.round,
                step=step.message.step,
                client=site,
                loss=loss,
                tokens=step.message.labelled_tokens,
                examples=len(step.message.lengths),
                seconds={leg: round(spent, 6) for leg, spent in step.seconds.items()},
                traffic=self._desk.traffic_of(site),
            )
        )
        self._done[site] += 1

    def _try(self, arrivals: list[Arrival]) -> None:
        """Held-out batches."""
        here = {one.site: one for one in arrivals if self._accept(one, training=False)}
        messages = [one.message for one in here.values() if isinstance(one.message, Activations)]
        for group in self._server.groups(messages):
            for site, reply in self._server.forward(group).items():
                here[site].reply(reply)

    def _accept(self, arrival: Arrival, training: bool = True) -> bool:
        """Whether a step may be worked on; if not, its sender is out of the round."""
        message, site = arrival.message, arrival.site
        try:
            if isinstance(message, Activations):
                expect(message, Activations, training=training)
                if training:
                    expect(message, Activations, step=self.steps[site] + self._done[site])
                self._server.check(message)
            elif isinstance(message, HeadGradient) and training:
                self._server.check(message)
            else:
                raise ProtocolError(f"{type(message).__name__} came, a held-out batch was due")
        except SplitftError as error:
            self._answer_refused(arrival, error)
            self._refuse(site, error)
            return False
        return True

    def _check_factors(self, site: str, adapters: AdapterState) -> None:
        """Raise unless these are the factors of the site's blocks, at its ranks."""
        cut = self._moving[site]
        own, ranks = self._global.within(Span(0, cut)), self._ranks.of(cut, site)
        if adapters.keys() != own.keys():
            odd = min(adapters.keys() ^ own.keys())
            raise AdapterError(f"{site} sends other factors than those of blocks 0 to {cut - 1}: {odd}")
        for key, factors in adapters.items():
            if (factors.magnitude is None) != (own[key].magnitude is None):
                raise AdapterError(f"{site} and this run do not agree on magnitudes (lora.method) for {key}")
            due = ((ranks[key[0]], own[key].A.shape[1]), (own[key].B.shape[0], ranks[key[0]]))
            if (tuple(factors.A.shape), tuple(factors.B.shape)) != due:
                shapes = (tuple(factors.A.shape), tuple(factors.B.shape))
                raise AdapterError(f"{site} sends factors {shapes} for {key}; {due} were due")

    # --- who is there -----------------------------------------------------------------------------

    def decline(self, site: str, reason: str) -> None:
        """A site's data owner forbids what is asked: it takes no part in this link any more."""
        if site not in self._declined:
            self._declined.add(site)
            self._drop(site)
            self._note(site, "declined", reason)
            logger.warning("%s declines: %s", site, reason)

    def _reachable(self, names: Iterable[str]) -> list[str]:
        """Those of whom something was heard lately; who was lost is back with that."""
        there = []
        for name in names:
            if name in self._declined:
                continue
            if self._desk.silence_s(name) > self._spec.silence_s:
                if name not in self._out and name not in self._stale:
                    self._lose(name, "nothing was heard of it")
                continue
            if name in self._out:
                self._out.discard(name)
                self._note(name, "back", "it was heard again, and is told where the run is")
            there.append(name)
        return there

    def _brief(self, site: str) -> None:
        """Tell a site where the run is, if it does not know."""
        if site not in self._stale:
            return
        cut = self._state.cuts[site]
        self._desk.withdraw(site)
        self._desk.post(
            site,
            Join(
                round=self._state.round,
                cut=cut,
                steps=self.steps[site],
                adapters=self._state.adapters.within(Span(0, cut)),
                manifest=self._manifest,
            ),
        )
        self._stale.discard(site)

    def _need(self, answers: Mapping[str, object]) -> None:
        if len(answers) < self._spec.min_clients:
            raise PausedError(
                f"{len(answers)} sites are left in round {self._number}, deploy.min_clients asks for "
                f"{self._spec.min_clients}: the run pauses after round {self._state.round}"
            )

    def _lose(self, site: str, reason: str) -> None:
        self._drop(site)
        self._note(site, "lost", reason)

    def _refuse(self, site: str, error: SplitftError) -> None:
        """A site has sent what cannot be: it is out until the next round."""
        if site not in self._out:
            self._drop(site)
            self._note(site, "refused", f"{type(error).__name__}: {error}")

    def _drop(self, site: str) -> None:
        if site in self._desk.sites:
            self._server.leave(site)
            self._underway.pop(site, None)
            self._desk.withdraw(site)
            self._out.add(site)
            self._stale.add(site)

    def _answer_refused(self, arrival: Arrival, error: SplitftError) -> None:
        arrival.reply(Refused(error=type(error).__name__, reason=str(error)[:2000]))

    def _note(
        self, site: str, state: Literal["lost", "refused", "late", "back", "declined"], reason: str
    ) -> None:
        self._listener(SiteChanged(round=self._number, site=site, state=state, reason=reason))
