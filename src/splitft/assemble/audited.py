"""What an audit found for a run's setting: share of tokens recovered, by cut.

The figures come from `schedule.recovery`. An audit holds for one model, codec and noise, so none is guessed:
a setting without one is refused where a bound depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping

from splitft.config import RunConfig
from splitft.errors import ScheduleError


def recovery_of(config: RunConfig) -> Mapping[int, float]:
    """The figures for this run. Raises ScheduleError if there are none."""
    if config.schedule.recovery:
        return config.schedule.recovery
    raise ScheduleError(
        f"schedule.max_recovery: {config.model.name} was not audited with this codec and noise, so no cut "
        "can be said to keep it; run splitft audit and give its figures as schedule.recovery, or set "
        "schedule.min_cut"
    )
