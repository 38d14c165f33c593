"""Where a deployed run is, at a glance: sites, cuts, rounds, losses, throughput, when each was last heard.

events --> Board --status()--> plain data, which `splitft deploy status` draws
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
    SessionStarted,
    SiteChanged,
    StepDone,
)

WINDOW_S = 60.0
"""Throughput is taken over this many seconds."""


@dataclass
class _Line:
    """One site's line."""

    cut: int | None = None
    state: str = "away"
    steps: int = 0
    """Steps in the round underway."""
    loss: float | None = None
    """Of its last step."""
    held_out: float | None = None
    recent: deque[tuple[float, int]] = field(default_factory=deque)
    """(time, tokens) of its last steps."""


class RunStatus:
    """Listens to the events of a link."""

    def __init__(self, sites: Sequence[str], rounds: int) -> None:
        self._lines = {name: _Line() for name in sites}
        self._rounds, self._round = rounds, 0
        self.rounds_done = 0
        """Rounds that are safe on disk."""
        self._started = False
        self._losses: list[float] = []
        self._lock = Lock()

    def place(self, cuts: Mapping[str, int]) -> None:
        """Take in the cuts with which a link begins."""
        with self._lock:
            for name, cut in cuts.items():
                self._lines[name].cut = cut

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        with self._lock:
            match event:
                case SessionStarted():
                    self._started = True
                    self.rounds_done = event.round - 1
                    for name, line in self._lines.items():
                        line.state = "training" if name in event.sites else "away"
                case RunResumed():
                    self.rounds_done = event.round - 1
                case CutsChanged():
                    for name, cut in event.cuts.items():
                        self._lines[name].cut = cut
                case StepDone():
                    self._step(event)
                case SiteChanged() if event.site in self._lines:
                    self._lines[event.site].state = "training" if event.state == "back" else event.state
                case Evaluated():
                    self._losses.append(event.loss)
                    for name, loss in event.by_client.items():
                        self._lines[name].held_out = loss
                case CheckpointSaved():
                    self.rounds_done = event.round
                case _:
                    pass

    def _step(self, event: StepDone) -> None:
        if event.round != self._round:
            self._round = event.round
            for line in self._lines.values():
                line.steps = 0
        line = self._lines[event.client]
        line.steps += 1
        line.loss, line.state = event.loss, "training"
        line.recent.append((event.t, event.tokens))

    def status(self, silence_s: Mapping[str, float]) -> dict[str, Any]:
        """Plain data; `silence_s` says since when nothing was heard of each site."""
        now = time.time()
        with self._lock:
            sites = []
            for name, line in self._lines.items():
                while line.recent and now - line.recent[0][0] > WINDOW_S:
                    line.recent.popleft()
                silence = silence_s.get(name, math.inf)
                sites.append({
                    "name": name,
                    "cut": line.cut,
                    "state": line.state,
                    "steps": line.steps,
                    "loss": line.loss,
                    "held_out": line.held_out,
                    "tokens_per_s": round(sum(tokens for _, tokens in line.recent) / WINDOW_S, 1),
                    "heard_s_ago": None if math.isinf(silence) else round(silence, 1),
                })  # fmt: skip
            return {
                "started": self._started,
                "round": self._round,
                "rounds": self._rounds,
                "rounds_done": self.rounds_done,
                "eval_loss": self._losses[-1] if self._losses else None,
                "sites": sites,
            }
