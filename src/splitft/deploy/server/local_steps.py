"""Steps of sites that hold the whole model and train alone, as they report them.

    LocalStep --check--> counted, StepDone        tokens, loss and seconds are the site's own word

The server sees neither their text nor their hidden states. It bounds what they claim by the steps that it has
ordered, the run's batches and the text that they have registered (`claims`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from splitft.deploy.server.claims import SiteLimits, check_alone
from splitft.errors import ProtocolError
from splitft.protocol import LocalStep, expect
from splitft.tracking.events import StepDone, Traffic
from splitft.training.server import Server


class LocalSteps:
    """Claims of the sites that train alone."""

    def __init__(self, server: Server, limits: Mapping[str, SiteLimits]) -> None:
        self._server, self._limits, self._round = server, limits, 0
        self.tokens: Counter[str] = Counter()
        """Labelled tokens that each claims in this round."""

    def begin(self, number: int) -> None:
        """Begin round `number`."""
        self._round = number
        self.tokens.clear()

    def trains_alone(self, site: str) -> bool:
        """Return whether the server holds nothing for a site."""
        blocks = self._server.segment.shape.blocks
        return self._server.split.labels == "client" and self._server.blocks.cuts.get(site) == blocks

    def check(self, message: LocalStep, training: bool) -> None:
        """Raise ProtocolError unless a site may have taken this step, or evaluated this batch."""
        expect(message, LocalStep, training=training)
        site, spec = message.client, self._server.training
        if not self.trains_alone(site):
            raise ProtocolError(f"{site} reports a step of its own, but the server holds blocks for it")
        check_alone(message, spec)
        if site in self._limits:
            self._limits[site].check_alone(message, spec, self.tokens[site])

    def check_due(self, message: LocalStep, first: int, done: int) -> None:
        """Raise ProtocolError unless a step is the next one; `first` was the first of the round."""
        expect(message, LocalStep, round=self._round, step=first + done)
        if done >= self._server.training.steps:
            raise ProtocolError(f"{message.client} reports more than the {done} steps that were ordered")

    def count(self, message: LocalStep, traffic: Traffic) -> StepDone:
        """Count a training step, and return its event."""
        self.tokens[message.client] += message.tokens
        return StepDone(
            round=message.round,
            step=message.step,
            client=message.client,
            loss=message.loss,
            tokens=message.tokens,
            examples=message.sequences,
            seconds={"client_step": round(message.seconds, 6)},
            traffic=traffic,
        )
