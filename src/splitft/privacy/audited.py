"""What audits have found for a run's setting: figures by cut for bounds, and one sentence for people.

The figures come from `schedule.recovery`, or from the stored audits of known models. An audit holds for one
model, codec and noise, so none is guessed: a setting without one is refused where a bound depends on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from splitft.config import RunConfig
from splitft.errors import ScheduleError
from splitft.privacy.known_leakage import Setting, known_sentence, recoveries


def recovery_of(config: RunConfig) -> Mapping[int, float]:
    """The figures for this run. Raises ScheduleError if there are none."""
    if config.schedule.recovery:
        return config.schedule.recovery
    hidden, gradient = config.privacy.hidden, config.privacy.gradient
    if config.split.labels == "client" and _stored(config):
        codec = str(config.wire.hidden)
        if known := recoveries(config.model.name, codec, hidden.noise, gradient.noise):
            return known
    raise ScheduleError(
        f"schedule.max_recovery: {config.model.name} was not audited with this codec and noise, so no cut "
        "can be said to keep it; run splitft audit and give its figures as schedule.recovery, or set "
        "schedule.min_cut"
    )


def audited_sentence(config: RunConfig, cuts: Iterable[int]) -> str:
    """What the server can read at the shallowest of these cuts, from stored audits; or "not audited"."""
    privacy = config.privacy
    if not _stored(config):
        return f"At cut {min(cuts)} with these defences: not audited."
    setting = Setting(min(cuts), str(config.wire.hidden), privacy.hidden.noise, privacy.gradient.noise)
    return known_sentence(config.model.name, setting, config.split.labels == "server")


def _stored(config: RunConfig) -> bool:
    """Whether stored audits are of this run's defences: Gaussian noise, or none."""
    privacy = config.privacy
    rows = (privacy.hidden.defence, privacy.gradient.defence)
    return privacy.labels.defence == "none" and all(one in ("none", "gaussian") for one in rows)
