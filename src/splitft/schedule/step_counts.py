"""Local steps of each client by time (`training.steps_by: time`): whoever is done early takes more.

    slowest client   |==step==|==step==|==step==|              training.steps
    quick client     |=|=|=|=|=|=|=|=|=|=|=|=|=|               as many as fit, at most MOST_TIMES as many

The round's time T is that in which every client takes `training.steps`. A client alone would fit
(T - fetching and sending adapters) / (seconds of its step). Clients also wait for one another at the server,
so all get the same share of what they could take beyond `training.steps`: the largest with which the
simulated round is hardly longer than T (WAITED).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from splitft.schedule.clock import ClientRound, simulate_round
from splitft.schedule.profile import ServerProfile
from splitft.specs.training import MOST_TIMES

HALVINGS = 6
"""Halvings of the interval in which the share is searched."""
ROUNDING = 1e-9
"""Relative rounding of sums of times."""
WAITED = 0.02
"""Share of the round by which it may be longer, as the slowest waits at the server for the others."""


def steps_by_time(clients: Sequence[ClientRound], server: ServerProfile) -> dict[str, int]:
    """Return the steps of each client in a round that is hardly longer than with the steps that they have."""
    round_s = simulate_round(clients, server).round_s
    extra = {one.name: _alone(one, round_s) - one.steps for one in clients}

    def with_share(share: float) -> dict[str, int]:
        return {one.name: one.steps + int(share * extra[one.name]) for one in clients}

    def fits(steps: dict[str, int]) -> bool:
        longer = [replace(one, steps=steps[one.name]) for one in clients]
        return simulate_round(longer, server).round_s <= round_s * (1 + WAITED)

    low, high = 0.0, 1.0
    if fits(with_share(high)):
        return with_share(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(with_share(middle)) else (low, middle)
    return with_share(low)


def _alone(client: ClientRound, round_s: float) -> int:
    """Return the steps that a client alone would take in this time, within bounds."""
    once_s = sum(leg.seconds for leg in (*client.before, *client.after))
    step_s = client.micro_batches * sum(leg.seconds for leg in client.step)
    fit = int((round_s - once_s) / step_s * (1 + ROUNDING)) if step_s else client.steps
    return min(max(fit, client.steps), MOST_TIMES * client.steps)
