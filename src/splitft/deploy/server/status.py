"""The status of a deployed run: sites, cuts, rounds, losses, throughput, time of each site's last message.

events --> RunStatus --as_data()--> plain data, which `splitft deploy status` draws
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from splitft.tracking.events import (
    CheckpointSaved,
    CutsChanged,
    Evaluated,
    Event,
    RunResumed,
    SessionEnded,
    SessionStarted,
    SiteChanged,
    StepDone,
    Warned,
)

WINDOW_S = 60.0
"""Throughput is averaged over this many seconds."""
NOTES_KEPT = 20
"""Messages of a session that its status has."""


@dataclass
class _SiteStatus:
    """Status of one site."""

    cut: int | None = None
    state: str = "away"
    steps: int = 0
    """Steps in the current round."""
    loss: float | None = None
    """Loss of its last step."""
    held_out: float | None = None
    recent: deque[tuple[float, int]] = field(default_factory=deque)
    """(time on the monotonic clock, tokens) of its last steps."""
    reason: str = ""
    """Why it is in this state, if it does not train."""


class RunStatus:
    """Status of a run, kept up to date by the events of a session."""

    def __init__(self, sites: Sequence[str], rounds: int) -> None:
        self._sites = {name: _SiteStatus() for name in sites}
        self._rounds, self._round = rounds, 0
        self.rounds_done = 0
        """Rounds that are saved on disk."""
        self._started = False
        self._held_out: float | None = None
        self._accuracy: float | None = None
        self._notes: deque[tuple[int, str]] = deque(maxlen=NOTES_KEPT)
        self._noted = 0
        self._lock = Lock()

    def place(self, cuts: Mapping[str, int]) -> None:
        """Set the cuts with which a session begins."""
        with self._lock:
            for name, cut in cuts.items():
                self._sites[name].cut = cut

    def __call__(self, event: Event) -> None:
        """Update the status by one event."""
        with self._lock:
            match event:
                case SessionStarted():
                    self._started = True
                    self.rounds_done = event.round - 1
                    for name, site in self._sites.items():
                        site.state = "training" if name in event.sites else "away"
                case RunResumed():
                    self.rounds_done = event.round - 1
                case CutsChanged():
                    for name, cut in event.cuts.items():
                        self._sites[name].cut = cut
                case StepDone():
                    self._step(event)
                case SiteChanged():
                    self._note(event.message)
                    if event.site in self._sites:
                        changed = self._sites[event.site]
                        changed.state = "training" if event.state == "back" else event.state
                        changed.reason = event.reason
                case Warned():
                    self._note(event.message)
                case SessionEnded() if event.detail:
                    self._note(f"the session ends: {event.detail}")
                case Evaluated():
                    self._held_out, self._accuracy = event.loss, event.accuracy
                    for name, loss in event.by_client.items():
                        self._sites[name].held_out = loss
                case CheckpointSaved():
                    self.rounds_done = event.round
                case _:
                    pass

    def _step(self, event: StepDone) -> None:
        if event.round != self._round:
            self._round = event.round
            for site in self._sites.values():
                site.steps = 0
        site = self._sites[event.client]
        site.steps += 1
        site.loss, site.state = event.loss, "training"
        site.recent.append((time.monotonic(), event.tokens))

    def _note(self, text: str) -> None:
        self._noted += 1
        self._notes.append((self._noted, text))

    def notes(self) -> tuple[tuple[int, str], ...]:
        """Return the numbered messages of the session."""
        with self._lock:
            return tuple(self._notes)

    def as_data(self, silence_s: Mapping[str, float]) -> dict[str, Any]:
        """Return plain data; `silence_s` has the seconds since each site's last message."""
        now = time.monotonic()  # a clock that is set does not move it
        with self._lock:
            sites = []
            for name, site in self._sites.items():
                while site.recent and now - site.recent[0][0] > WINDOW_S:
                    site.recent.popleft()
                silence = silence_s.get(name, math.inf)
                sites.append({
                    "name": name,
                    "cut": site.cut,
                    "state": site.state,
                    "reason": "" if site.state == "training" else site.reason,
                    "steps": site.steps,
                    "loss": site.loss,
                    "held_out": site.held_out,
                    "tokens_per_s": round(sum(tokens for _, tokens in site.recent) / WINDOW_S, 1),
                    "heard_s_ago": None if math.isinf(silence) else round(silence, 1),
                })  # fmt: skip
            return {
                "started": self._started,
                "round": self._round,
                "rounds": self._rounds,
                "rounds_done": self.rounds_done,
                "eval_loss": self._held_out,
                "eval_accuracy": self._accuracy,
                "sites": sites,
                "notes": list(self._notes),
            }
