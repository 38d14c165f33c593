"""Serve the training and evaluation steps of all sites: valid ones in groups, the others refused.

    Activations  --check--> server.forward, in groups of similar lengths --> LastHidden or CutGradient
    HeadGradient --check--> server.backward, in the groups of forward    --> CutGradient, and StepDone

A step may come in micro-batches, several of them in flight; the run counts it as one step. `done` counts a
site's steps of this round when the server has finished them, `steps` those of the run when the site's
adapters have arrived. If a site is stopped or lost, its unfinished step is discarded.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from splitft.adapters import AdapterState
from splitft.deploy.server.inbox import Arrival, Inbox
from splitft.errors import AdapterError, ProtocolError, SplitftError
from splitft.geometry import Span
from splitft.protocol import Activations, CutGradient, HeadGradient, Stop, expect
from splitft.tracking.events import StepDone
from splitft.training.ranks import RankPolicy
from splitft.training.server import Server

OnStep = Callable[[StepDone], None]


class StepService:
    """The steps of all sites of a session."""

    def __init__(
        self,
        inbox: Inbox,
        server: Server,
        steps: Mapping[str, int],
        refuse: Callable[[str, SplitftError], None],
    ) -> None:
        """Go on from these counts of steps; `refuse` is called with a site that sends an invalid step."""
        self._inbox, self._server, self._refuse = inbox, server, refuse
        self.steps = dict.fromkeys(inbox.sites, 0) | dict(steps)
        """Optimizer steps of each site in finished rounds."""
        self.done: dict[str, int] = {}
        """Finished steps of each site in this round."""
        self._on_step: OnStep | None = None  # None for held-out batches
        self._seconds: dict[str, dict[str, float]] = {}  # of unfinished steps, by leg

    def begin_training(self, participants: Iterable[str], on_step: OnStep) -> None:
        """Begin the local steps of a round."""
        self.done, self._on_step = dict.fromkeys(participants, 0), on_step
        self._seconds = {}

    def begin_evaluation(self) -> None:
        """Begin the held-out batches after a round."""
        self._on_step = None

    def commit(self, sites: Iterable[str]) -> None:
        """Count the round's steps of these sites, whose adapters have arrived."""
        for site in sites:
            self.steps[site] += self.done[site]

    def discard(self, site: str) -> None:
        """Discard the site's unfinished step."""
        self._seconds.pop(site, None)

    def stop(self, arrival: Arrival, number: int) -> None:
        """Tell a slow site that the round is over; server and site discard its unfinished step."""
        self._server.forget(arrival.site)
        self.discard(arrival.site)
        arrival.reply(Stop(round=number))

    def serve(self, arrivals: Iterable[Arrival]) -> None:
        """Process and answer steps: forward in groups of similar lengths, backward in the same groups."""
        for wave in _one_per_site(arrivals):
            valid = {one.site: one for one in wave if self._accept(one)}
            messages = [one.message for one in valid.values()]
            for message in messages:
                if isinstance(message, Activations | HeadGradient) and self._on_step is not None:
                    for leg, seconds in message.seconds.items():
                        self._add_seconds(message.client, leg, seconds)
            self._forward(valid, [one for one in messages if isinstance(one, Activations)])
            self._backward(valid, [one for one in messages if isinstance(one, HeadGradient)])

    def _accept(self, arrival: Arrival) -> bool:
        """Return whether a step may be processed; otherwise refuse it and its sender."""
        message, site, training = arrival.message, arrival.site, self._on_step is not None
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
            arrival.refuse(error)
            self._refuse(site, error)
            return False
        return True

    def _forward(self, arrivals: Mapping[str, Arrival], messages: list[Activations]) -> None:
        for group in self._server.groups(messages):
            began = time.monotonic()
            replies = self._server.forward(group, checked=True)
            share = (time.monotonic() - began) / len(group)
            for message in group:
                site, reply = message.client, replies[message.client]
                if self._on_step is not None:
                    self._add_seconds(site, "server_forward", share)
                    if isinstance(reply, CutGradient):  # labels on the server
                        self._finish(site)
                arrivals[site].reply(reply)

    def _backward(self, arrivals: Mapping[str, Arrival], messages: list[HeadGradient]) -> None:
        for group in self._server.group_gradients(messages):
            began = time.monotonic()
            replies = self._server.backward(group, checked=True)
            share = (time.monotonic() - began) / len(group)
            for message in group:
                self._add_seconds(message.client, "server_backward", share)
                self._finish(message.client)
                arrivals[message.client].reply(replies[message.client])

    def _add_seconds(self, site: str, leg: str, seconds: float) -> None:
        legs = self._seconds.setdefault(site, {})
        legs[leg] = legs.get(leg, 0.0) + seconds

    def _finish(self, site: str) -> None:
        """Count the step that a site's last micro-batch completed, if it did."""
        totals = self._server.completed_step(site)
        if totals is None:
            return
        assert self._on_step is not None
        seconds, traffic = self._seconds.pop(site, {}), self._inbox.traffic_of(site)
        self._on_step(totals.event(site, seconds, traffic))
        self.done[site] += 1


def _one_per_site(arrivals: Iterable[Arrival]) -> list[list[Arrival]]:
    """Divide steps so that each list has one of a site: a step is checked after those before it are done."""
    waves: list[list[Arrival]] = []
    seen: Counter[str] = Counter()
    for arrival in arrivals:
        if seen[arrival.site] == len(waves):
            waves.append([])
        waves[seen[arrival.site]].append(arrival)
        seen[arrival.site] += 1
    return waves


def check_factors(
    site: str, adapters: AdapterState, state: AdapterState, cut: int, ranks: RankPolicy
) -> None:
    """Raise AdapterError unless an upload has the blocks and shapes of a site at this cut."""
    if odd := adapters.keys() ^ state.within(Span(0, cut)).keys():
        raise AdapterError(f"{site} sends other factors than those of its blocks: {min(odd)}")
    try:
        ranks.validate_upload(site, adapters, state, cut)
    except ProtocolError as error:
        raise AdapterError(str(error)) from error
