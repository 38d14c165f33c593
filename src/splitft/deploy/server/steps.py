"""Serve the training and evaluation steps of all sites: valid ones in groups, the others refused.

    Activations  --check--> server.forward, in groups of similar lengths --> LastHidden or CutGradient
    HeadGradient --check--> server.backward, in the groups of forward    --> CutGradient, and StepDone
    LocalStep    --check--> counted: the site has the whole model        --> Wait, and StepDone

A step may come in micro-batches, several of them in flight; the run counts it as one step. `done` counts a
site's steps of this round when the server has finished them, `steps` those of the run when the site's
adapters have arrived. If a site is stopped or lost, its unfinished step is discarded. Where sites share the
server's factors, `turns` decides whose step comes next.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from splitft.deploy.server.arrivals import Arrival
from splitft.deploy.server.claims import HeldOutCount, SiteLimits, check_gradient, check_labelled, unusable
from splitft.deploy.server.inbox import Inbox
from splitft.deploy.server.local_steps import LocalSteps
from splitft.deploy.server.turns import StepQueue
from splitft.errors import ProtocolError, ReplicaError, SplitftError
from splitft.model.devices import synchronize
from splitft.protocol import (
    Activations,
    CutGradient,
    HeadGradient,
    HeldOutLoss,
    LocalStep,
    Message,
    Stop,
    Wait,
    expect,
)
from splitft.tracking.events import StepDone
from splitft.training.batching import Group
from splitft.training.server import Server

OnStep = Callable[[StepDone], None]


class StepService:
    """The steps of all sites of a session."""

    def __init__(
        self,
        inbox: Inbox,
        server: Server,
        steps: Mapping[str, int],
        limits: Mapping[str, SiteLimits],
        refuse: Callable[[str, SplitftError], None],
        turn_s: float,
    ) -> None:
        """Go on from these counts of steps; `refuse` is called with a site that sends an invalid step.

        `turn_s` is how long one site may keep the others waiting for their turn.
        """
        self.queue, self.alone = StepQueue(server, turn_s), LocalSteps(server, limits)
        self._inbox, self._server, self._limits, self._refuse = inbox, server, limits, refuse
        self.steps = dict.fromkeys(inbox.sites, 0) | dict(steps)
        """Optimizer steps of each site in finished rounds."""
        self.done: dict[str, int] = {}
        """Finished steps of each site in this round."""
        self.held_out: dict[str, HeldOutCount] = {}
        """Held-out batches of each site in this evaluation."""
        self._evaluated = 0  # rounds finished before this evaluation
        self._on_step: OnStep | None = None  # None for held-out batches
        self._seconds: dict[str, dict[str, float]] = {}  # of unfinished steps, by leg

    def begin_training(self, number: int, participants: Iterable[str], on_step: OnStep) -> None:
        """Begin the local steps of round `number`."""
        self.done, self._on_step = dict.fromkeys(participants, 0), on_step
        self._seconds = {}
        self.alone.begin(number)
        self.queue.begin(training=True)

    def begin_evaluation(self, number: int, count: Callable[[], HeldOutCount] = HeldOutCount) -> None:
        """Begin the held-out batches after round `number`; `count` makes a site's account of them."""
        self._on_step, self._evaluated = None, number
        self.held_out = {name: count() for name in self._inbox.sites}
        self.queue.begin(training=False)

    def commit(self, sites: Iterable[str]) -> None:
        """Count the round's steps of these sites, whose adapters have arrived."""
        for site in sites:
            self.steps[site] += self.done[site]

    def discard(self, site: str) -> None:
        """Discard the unfinished step of a site that is out of the round."""
        self._seconds.pop(site, None)
        for arrival in self.queue.withdraw(site):
            arrival.refuse(ProtocolError(f"{site} is not in this round"))

    def rest(self, site: str, number: int) -> None:
        """Take no further step of a site in this round; server and site discard its unfinished one."""
        self._server.rest(site)
        self._seconds.pop(site, None)
        for arrival in self.queue.withdraw(site):
            self.stop(arrival, number)

    def stop(self, arrival: Arrival, number: int) -> None:
        """Tell a slow site that the round is over. A step that it has taken alone counts."""
        if isinstance(arrival.message, LocalStep):
            if not self._accept(arrival):
                return
            self._count_alone(arrival.message)
        arrival.reply(Stop(round=number))

    def serve(self, arrivals: Iterable[Arrival]) -> None:
        """Process and answer the steps that are due, these and earlier ones; the others wait."""
        self.queue.add(arrivals)
        while due := self.queue.due():
            self._serve(due)

    def _serve(self, arrivals: Iterable[Arrival]) -> None:
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
            for message in messages:
                if isinstance(message, LocalStep):
                    self._count_alone(message)
                    valid[message.client].reply(Wait())

    def _accept(self, arrival: Arrival) -> bool:
        """Return whether a step may be processed; otherwise refuse it and its sender."""
        try:
            self._check(arrival.site, arrival.message)
        except SplitftError as error:
            self._leave_out(arrival, error)
            return False
        return True

    def _check(self, site: str, message: Message) -> None:
        """Raise a SplitftError unless a step of this site is due, and within what it may send."""
        training = self._on_step is not None
        if isinstance(message, Activations):
            expect(message, Activations, training=training)
            check_labelled(message)
            if site in self._limits:
                self._limits[site].check(message)
            if training:
                expect(message, Activations, step=self.steps[site] + self.done[site])
            else:
                self.held_out[site].check(message, self._evaluated, self._limits.get(site))
            self._server.check(message)
        elif isinstance(message, LocalStep):
            self.alone.check(message, training)
            if training:
                self.alone.check_due(message, self.steps[site], self.done[site])
            else:
                self.held_out[site].check(message, self._evaluated, self._limits.get(site))
        elif isinstance(message, HeadGradient) and training:
            check_gradient(message)
            self._server.check(message)
        else:
            raise ProtocolError(f"{type(message).__name__} came, a held-out batch was due")

    def _leave_out(self, arrival: Arrival, error: SplitftError) -> None:
        """Refuse a step and its sender, whose order is void before it asks for the next."""
        self._refuse(arrival.site, error)
        arrival.refuse(error)

    def _blame(
        self, arrivals: Mapping[str, Arrival], group: Sequence[Activations | HeadGradient], error: Exception
    ) -> None:
        """Leave out the senders of steps on which the server's own code has failed.

        Raises the error again if a process of the server has ended, which is no sender's fault.
        """
        if isinstance(error, ReplicaError):
            raise error
        for message in group:
            arrival = arrivals[message.client]
            self._leave_out(arrival, unusable(arrival.site, type(message).__name__, error))

    def _forward(self, arrivals: Mapping[str, Arrival], messages: list[Activations]) -> None:
        """Run batches in groups; with several devices launch all first, so that each device has work."""
        groups = self._server.groups(messages) if messages else []
        together = max(1, len(groups)) if self._server.blocks.pipelined else 1
        for start in range(0, len(groups), together):
            launched = [
                one for group in groups[start : start + together] for one in self._launch(arrivals, group)
            ]
            for group, seconds in launched:
                self._reply(arrivals, group, seconds)

    def _launch(
        self, arrivals: Mapping[str, Arrival], messages: list[Activations]
    ) -> list[tuple[Group, float]]:
        """Launch one group; if that fails, each of its batches by itself, to find the one at fault.

        Return what was launched, with the seconds it took.
        """
        began = time.monotonic()
        try:
            group = self._server.launch(messages, checked=True)
        except Exception as error:  # whatever the batches have caused is their senders' fault
            if len(messages) > 1:
                return [one for message in messages for one in self._launch(arrivals, [message])]
            self._blame(arrivals, messages, error)
            return []
        return [(group, time.monotonic() - began)]

    def _reply(self, arrivals: Mapping[str, Arrival], group: Group, seconds: float) -> None:
        """Answer the batches of a launched group."""
        began = time.monotonic()
        try:
            replies = self._server.replies(group)
        except Exception as error:
            self._blame(arrivals, list(group.messages.values()), error)
            return
        share = (seconds + time.monotonic() - began) / len(replies)
        for site, message in group.messages.items():
            reply = replies[site]
            if self._on_step is None:
                self._count_held_out(message, reply)
            else:
                self._add_seconds(site, "server_forward", share)
                if isinstance(reply, CutGradient):  # labels on the server
                    self._finish(site)
            arrivals[site].reply(reply)

    def _count_alone(self, message: LocalStep) -> None:
        """Count a step or a held-out batch of a site that needs no server."""
        site = message.client
        if self._on_step is None:
            self.held_out[site].add(message)
        else:
            self._on_step(self.alone.count(message, self._inbox.traffic_of(site)))
            self.done[site] += 1

    def _count_held_out(self, message: Activations, reply: Message) -> None:
        """Count a held-out batch, with its loss if the labels are here."""
        count = self.held_out[message.client]
        count.add(message)
        if isinstance(reply, HeldOutLoss):
            count.loss = (count.loss or 0.0) + reply.loss
            count.correct = (count.correct or 0) + (reply.correct or 0)

    def _backward(self, arrivals: Mapping[str, Arrival], messages: list[HeadGradient]) -> None:
        for group in self._server.group_gradients(messages):
            began = time.monotonic()
            try:
                replies = self._server.backward(group, checked=True)
                synchronize(self._server.segment.devices)
            except Exception as error:  # whatever the gradients have caused is their senders' fault
                self._blame(arrivals, group, error)
                continue
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
