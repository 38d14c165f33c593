"""Steps of a deployed run as they come: what fits is worked on in groups, what does not is refused.

    Activations ---accept--> server.forward, in groups of like lengths  --> LastHidden or CutGradient
    HeadGradient --accept--> server.backward, as they were grouped      --> CutGradient, and StepDone

A step counts for a site once the server has taken it (`done`), and for the run once its adapters are in
(`settle`); of a site that was stopped or lost the step underway is forgotten.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from splitft.adapters import AdapterState
from splitft.deploy.desk import Arrival, Desk
from splitft.errors import AdapterError, ProtocolError, SplitftError
from splitft.protocol import Activations, CutGradient, HeadGradient, Refused, Stop, expect
from splitft.runtime.server import Server
from splitft.tracking.events import StepDone


@dataclass
class _Underway:
    """One site's step between its hidden states and its gradient."""

    message: Activations
    began: float
    seconds: dict[str, float] = field(default_factory=dict)


class Stepping:
    """The steps of all sites."""

    def __init__(
        self,
        desk: Desk,
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
        self.underway: dict[str, _Underway] = {}
        """Between hidden states and gradient."""

    def begin(self, participants: Iterable[str]) -> None:
        """A round of training begins."""
        self.done, self.underway = dict.fromkeys(participants, 0), {}

    def settle(self, sites: Iterable[str]) -> None:
        """What these have trained is in."""
        for site in sites:
            self.steps[site] += self.done[site]

    def forget(self, site: str) -> None:
        """Give up the step that is underway."""
        self.underway.pop(site, None)

    def stop(self, arrival: Arrival, number: int) -> None:
        """The round's time is up for this site; its step underway is forgotten on both sides."""
        self._server.forget(arrival.site)
        self.forget(arrival.site)
        arrival.reply(Stop(round=number))

    def work(self, arrivals: list[Arrival], listener: Callable[[StepDone], None]) -> None:
        """All steps that have come: forwards in groups of like lengths, backwards as they were grouped."""
        here = {one.site: one for one in arrivals if self._accept(one)}
        forwards = [one.message for one in here.values() if isinstance(one.message, Activations)]
        backwards = [one.message for one in here.values() if isinstance(one.message, HeadGradient)]
        for group in self._server.groups(forwards):
            began = time.monotonic()
            replies = self._server.forward(group)
            share = (time.monotonic() - began) / len(group)
            for message in group:
                step = self.underway[message.client] = _Underway(message, began)
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
                self.underway[gradient.client].seconds["server_backward"] = share
                self._finish(gradient.client, gradient.loss, listener)
                here[gradient.client].reply(at_cuts[gradient.client])

    def _finish(self, site: str, loss: float, listener: Callable[[StepDone], None]) -> None:
        """A step is taken on the server's side; the site takes it when it has the answer."""
        step = self.underway.pop(site)
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
        self.done[site] += 1

    def try_out(self, arrivals: list[Arrival]) -> None:
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


def answer_refused(arrival: Arrival, error: SplitftError) -> None:
    """Tell the sender of a step why it is not worked on."""
    arrival.reply(Refused(error=type(error).__name__, reason=str(error)[:2000]))


def check_factors(site: str, adapters: AdapterState, own: AdapterState, ranks: Mapping[int, int]) -> None:
    """Raise AdapterError unless these are factors of the layers of `own`, at these ranks by block."""
    if adapters.keys() != own.keys():
        odd = min(adapters.keys() ^ own.keys())
        raise AdapterError(f"{site} sends other factors than those of its blocks: {odd}")
    for key, factors in adapters.items():
        if (factors.magnitude is None) != (own[key].magnitude is None):
            raise AdapterError(f"{site} and this run do not agree on magnitudes (lora.method) for {key}")
        due = ((ranks[key[0]], own[key].A.shape[1]), (own[key].B.shape[0], ranks[key[0]]))
        if (tuple(factors.A.shape), tuple(factors.B.shape)) != due:
            shapes = (tuple(factors.A.shape), tuple(factors.B.shape))
            raise AdapterError(f"{site} sends factors {shapes} for {key}; {due} were due")
