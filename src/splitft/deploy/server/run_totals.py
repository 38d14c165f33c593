"""The totals of a deployed run for those who watch it: seconds, bytes, what sites were refused, losses.

events --> RunTotals --as_data()--> plain data, which `deploy.prometheus` exports and `deploy.alerts` judges
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from threading import Lock
from typing import Any

from splitft.tracking.events import (
    Evaluated,
    Event,
    RoundDone,
    RoundUndone,
    SiteChanged,
    StepDone,
    Traffic,
    UpdatesBounded,
)

LOSSES_KEPT = 50
"""Held-out losses of the last rounds that are known here."""
TROUBLES = ("refused", "declined", "lost", "late")
"""Changes of a site that are counted; so are updates that were `bounded`, losses `doubted`."""


class RunTotals:
    """Totals over the events of a run, kept up to date by each."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._reset()

    def restart(self, events: Iterable[Event]) -> None:
        """Count anew: these are all settled events so far."""
        with self._lock:
            self._reset()
        for event in events:
            self(event)

    def __call__(self, event: Event) -> None:
        """Count one event."""
        with self._lock:
            match event:
                case StepDone():
                    self._steps += 1
                    self._tokens += event.tokens
                    self._add_bytes("training", event.traffic)
                    for leg, seconds in event.seconds.items():
                        self._seconds[leg] += seconds
                case RoundDone():
                    for traffic in event.traffic.values():
                        self._add_bytes("training", traffic)
                case Evaluated():
                    self._losses.append(event.loss)
                    for site in event.outliers:
                        self._troubles[site, "doubted"] += 1
                    for traffic in event.traffic.values():
                        self._add_bytes("evaluation", traffic)
                case SiteChanged() if event.state in TROUBLES:
                    self._troubles[event.site, event.state] += 1
                case UpdatesBounded():
                    for site in event.scale:
                        self._troubles[site, "bounded"] += 1
                case RoundUndone():
                    self._undone.append(event.reason)
                case _:
                    pass

    def as_data(self) -> dict[str, Any]:
        """Return plain data."""
        with self._lock:
            return {
                "steps": self._steps,
                "tokens": self._tokens,
                "seconds": {leg: round(seconds, 6) for leg, seconds in self._seconds.items()},
                "bytes": [
                    {"purpose": purpose, "role": role, "direction": direction, "bytes": count}
                    for (purpose, role, direction), count in self._bytes.items()
                ],
                "troubles": [
                    {"site": site, "state": state, "times": times}
                    for (site, state), times in self._troubles.items()
                ],
                "undone": list(self._undone),
                "losses": list(self._losses),
            }

    def _reset(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._bytes: defaultdict[tuple[str, str, str], int] = defaultdict(int)
        self._troubles: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._losses: deque[float] = deque(maxlen=LOSSES_KEPT)
        self._undone: list[str] = []
        self._steps = self._tokens = 0

    def _add_bytes(self, purpose: str, traffic: Traffic) -> None:
        for role, count in traffic.up.items():
            self._bytes[purpose, role, "up"] += count
        for role, count in traffic.down.items():
            self._bytes[purpose, role, "down"] += count
