"""Measured seconds of a deployed run's steps, as a controller takes them: by leg, over what was predicted.

StepDone(client, seconds by leg), ... --median over the round--> ratios --> ClientChoices.measured
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass, field, replace

from splitft.schedule.problem import ClientChoices, measured_ratios
from splitft.tracking.events import StepDone


@dataclass
class MeasuredLegs:
    """The seconds of the last round's steps, and each client's last ratios."""

    _steps: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # client, leg -> seconds of steps
    _round: int = 0  # of these steps
    _ratios: dict[str, dict[str, float]] = field(default_factory=dict)  # measured / predicted, by client, leg

    def observe(self, event: StepDone) -> None:
        """Take in the seconds of one step."""
        if event.round != self._round:
            self._round, self._steps = event.round, {}
        legs = self._steps.setdefault(event.client, defaultdict(list))
        for leg, seconds in event.seconds.items():
            legs[leg].append(seconds)

    def of(self, client: ClientChoices, number: int, steps: int) -> dict[str, float]:
        """Return a client's seconds by leg in a whole round at its current cut, from the steps measured last.

        A step's seconds are the median over the round. A client that did not train in round `number` keeps
        the ratio of measured to predicted seconds that it had before.
        """
        predicted = client.option(client.current).seconds
        if self._round == number and (legs := self._steps.get(client.name)):
            seconds = {leg: steps * statistics.median(times) for leg, times in legs.items()}
            self._ratios[client.name] = measured_ratios(replace(client, measured=seconds))
        ratios = self._ratios.get(client.name, {})
        return {leg: ratio * predicted[leg] for leg, ratio in ratios.items() if leg in predicted}
