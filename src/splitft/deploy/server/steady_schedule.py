"""A schedule that never stops the run: if the controller fails between two rounds, the cuts are kept.

The first cuts of a session are found with every site that takes part (`setup`). Later decisions depend on
losses and times that sites report, and what they report must not end the run of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from splitft.errors import SplitftError
from splitft.schedule.controllers import Decision
from splitft.tracking.events import Listener, RoundTimed, Warned
from splitft.training.rounds import Schedule


class SteadySchedule:
    """Another schedule, with its errors turned into warnings. Implements `training.rounds.Schedule`."""

    def __init__(self, schedule: Schedule, listener: Listener) -> None:
        self._schedule, self._listener = schedule, listener

    def choose(self, number: int, cuts: Mapping[str, int], losses: Mapping[str, float]) -> Decision:
        """Choose the cuts of the next round, or keep the current ones."""
        try:
            return self._schedule.choose(number, cuts, losses)
        except SplitftError as error:
            self._listener(Warned(message=f"round {number}: the cuts stay as they are: {error}"))
            return Decision(cuts, f"no other cuts could be chosen: {error}")

    def steps(self, number: int, participants: Sequence[str], cuts: Mapping[str, int]) -> Mapping[str, int]:
        """Return the steps of each participant."""
        return self._schedule.steps(number, participants, cuts)

    def charge(
        self, number: int, participants: Sequence[str], before: Mapping[str, int], cuts: Mapping[str, int]
    ) -> RoundTimed:
        """Advance the simulated clock by one round."""
        return self._schedule.charge(number, participants, before, cuts)
