"""Steps of a deployed run as they come: what fits is worked on in groups, what does not is refused.

    Activations ---accept--> server.forward, in groups of like lengths  --> LastHidden or CutGradient
    HeadGradient --accept--> server.backward, as they were grouped      --> CutGradient, and StepDone

A step may come in micro-batches, several of them underway at once; to the run it is one step. It counts for
a site once the server has taken it (`done`), and for the run once its adapters are in (`settle`); of a site
that was stopped or lost the step underway is forgotten.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from splitft.adapters import AdapterState
from splitft.deploy.server.inbox import Arrival, Inbox
from splitft.errors import AdapterError, ProtocolError, SplitftError
from splitft.geometry import Span
from splitft.protocol import Activations, CutGradient, HeadGradient, Refused, Stop, expect
from splitft.tracking.events import StepDone
from splitft.training.micro_batch import StepTotals
from splitft.training.ranks import RankPolicy
from splitft.training.server import Server


class StepService:
    """The steps of all sites."""

    def __init__(
        self,
        desk: Inbox,
        server: Server,
        steps: Mapping[str, int],
        refuse: Callable[[str, SplitftError], None],
    ) -> None:
        """Go on from these counts of steps; `refuse` hears of a site that sends what cannot be."""
        self._desk, self._server, self._refuse = desk, server, refuse
        self.steps = dict.fromkeys(desk.sites, 0) | dict(steps)
        """Optimizer steps of each site that count."""
        self.done: dict[str, int] = {}
        """Steps finished in this round."""
        self._underway: dict[tuple[str, int], Activations] = {}  # by site and micro-batch
        self._tallies: dict[str, StepTotals] = {}  # of steps of which some micro-batches are done
        self._seconds: dict[str, dict[str, float]] = {}  # by leg, of steps that have begun

    def begin(self, participants: Iterable[str]) -> None:
        """A round of training begins."""
        self.done = dict.fromkeys(participants, 0)
        self._underway, self._tallies, self._seconds = {}, {}, {}

    def pending(self, site: str) -> bool:
        """Whether a step of the site has begun and is not whole."""
        return site in self._tallies or any(key[0] == site for key in self._underway)

    def settle(self, sites: Iterable[str]) -> None:
        """What these have trained is in."""
        for site in sites:
            self.steps[site] += self.done[site]

    def forget(self, site: str) -> None:
        """Give up the step that is underway."""
        for key in [key for key in self._underway if key[0] == site]:
            del self._underway[key]
        self._tallies.pop(site, None)
        self._seconds.pop(site, None)

    def stop(self, arrival: Arrival, number: int) -> None:
        """The round's time is up for this site; its step underway is forgotten on both sides."""
        self._server.forget(arrival.site)
        self.forget(arrival.site)
        arrival.reply(Stop(round=number))

    def work(self, arrivals: list[Arrival], listener: Callable[[StepDone], None]) -> None:
        """All that has come: forwards in groups of like lengths, backwards as they were grouped."""
        for wave in _one_a_site(arrivals):
            self._work(wave, listener)

    def _work(self, arrivals: list[Arrival], listener: Callable[[StepDone], None]) -> None:
        here = {one.site: one for one in arrivals if self._accept(one)}
        forwards = [one.message for one in here.values() if isinstance(one.message, Activations)]
        backwards = [one.message for one in here.values() if isinstance(one.message, HeadGradient)]
        for group in self._server.groups(forwards):
            began = time.monotonic()
            replies = self._server.forward(group)
            share = (time.monotonic() - began) / len(group)
            for message in group:
                site = message.client
                self._underway[site, message.micro_batch] = message
                self._spent(site, "server_forward", share)
                reply = replies[site]
                if isinstance(reply, CutGradient):
                    self._finish(site, message.micro_batch, reply.loss or 0.0, listener)
                here[message.client].reply(reply)
        for gradients in self._server.together(backwards):
            began = time.monotonic()
            at_cuts = self._server.backward(gradients)
            share = (time.monotonic() - began) / len(gradients)
            for gradient in gradients:
                self._spent(gradient.client, "server_backward", share)
                self._finish(gradient.client, gradient.micro_batch, gradient.loss, listener)
                here[gradient.client].reply(at_cuts[gradient.client])

    def _spent(self, site: str, leg: str, seconds: float) -> None:
        legs = self._seconds.setdefault(site, {})
        legs[leg] = legs.get(leg, 0.0) + seconds

    def _finish(self, site: str, number: int, loss: float, listener: Callable[[StepDone], None]) -> None:
        """A micro-batch is done here, and the step if it was the last; the site has it with the answer."""
        message = self._underway.pop((site, number))
        tally = self._tallies.setdefault(site, StepTotals())
        if not tally.add(message, loss):
            return
        del self._tallies[site]
        listener(
            StepDone(
                round=message.round,
                step=message.step,
                client=site,
                loss=tally.loss,
                tokens=tally.tokens,
                examples=tally.examples,
                seconds={leg: round(spent, 6) for leg, spent in self._seconds.pop(site, {}).items()},
                traffic=self._desk.traffic_of(site),
            )
        )
        self.done[site] += 1

    def try_out(self, arrivals: list[Arrival]) -> None:
        """Held-out batches."""
        for wave in _one_a_site(arrivals):
            self._try_out(wave)

    def _try_out(self, arrivals: list[Arrival]) -> None:
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
                    expect(message, Activations, step=self.steps[site] + self.done[site])
                self._server.check(message)
            elif isinstance(message, HeadGradient) and training:
                self._server.check(message)
            else:
                raise ProtocolError(f"{type(message).__name__} came, a held-out batch was due")
        except SplitftError as error:
            answer_refused(arrival, error)
            self._refuse(site, error)
            return False
        return True


def _one_a_site(arrivals: Iterable[Arrival]) -> list[list[Arrival]]:
    """In waves, none with two of one site: each is judged by what those before it have changed."""
    waves: list[list[Arrival]] = []
    seen: Counter[str] = Counter()
    for arrival in arrivals:
        if seen[arrival.site] == len(waves):
            waves.append([])
        waves[seen[arrival.site]].append(arrival)
        seen[arrival.site] += 1
    return waves


def answer_refused(arrival: Arrival, error: SplitftError) -> None:
    """Tell the sender of a step why it is not worked on."""
    arrival.reply(Refused(error=type(error).__name__, reason=str(error)[:2000]))


def check_factors(
    site: str, adapters: AdapterState, state: AdapterState, cut: int, ranks: RankPolicy
) -> None:
    """Raise AdapterError unless these are what a site of this cut owes, given the global factors."""
    if odd := adapters.keys() ^ state.within(Span(0, cut)).keys():
        raise AdapterError(f"{site} sends other factors than those of its blocks: {min(odd)}")
    try:
        ranks.validate_upload(site, adapters, state, cut)
    except ProtocolError as error:
        raise AdapterError(str(error)) from error
