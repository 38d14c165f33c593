"""A run as it goes, on the terminal: a listener that draws, and the table at the end.

    round 2/3 ━━━━━━━━━━━╸          61%  step 74/120 · 486 tokens/s · loss 2.713 · 0:00:31 left

On a terminal that is one line that moves; in a pipe or a log file, plain lines a few seconds apart.
Speeds are labelled tokens and steps over the last seconds of training, by the events' own clock, so
that evaluation and aggregation do not blur them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from splitft.tracking.events import (
    CutsChanged,
    Evaluated,
    Event,
    PrivacySpent,
    RoundDone,
    RunResumed,
    RunStarted,
    SessionStarted,
    SiteChanged,
    StepDone,
    Warned,
    WireChosen,
)
from splitft.tracking.log import settled
from splitft.tracking.summary import CLIENT_HEADINGS, client_rows, clock

__all__ = ["Progress", "client_table"]

_WINDOW_S = 20.0
"""Speeds are taken over this many seconds."""
_PLAIN_EVERY_S = 5.0
"""At most one plain line of progress in this many seconds."""


class Progress:
    """A listener and a context manager: `with Progress(console) as progress: train(..., progress)`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("reading the model and the text", total=None, note="")
        self._started: RunStarted | None = None
        self._done = 0
        self._total = 0
        self._first_loss: float | None = None
        self._recent: deque[StepDone] = deque()
        self._last_line_t = float("-inf")

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def remember(self, events: Iterable[Event]) -> None:
        """Take in what an earlier process of this run did, without drawing it."""
        for event in settled(events):
            self._count(event)
        self._recent.clear()

    def __call__(self, event: Event) -> None:
        """Count an event and show it."""
        self._count(event)
        match event:
            case RunStarted():
                about = f"{event.method}: {event.model}, {event.blocks} blocks, {len(event.clients)} clients"
                self._say(" ".join([f"{about}. {event.privacy}", *event.defences]))
            case RunResumed():
                self._say(f"continuing with round {event.round}")
            case CutsChanged():
                cuts = ", ".join(f"{name} {cut}" for name, cut in event.cuts.items())
                reason = f" ({event.reason})" if event.reason else ""
                self._say(f"round {event.round}: cuts {cuts}{reason}")
            case WireChosen():
                codecs = f"{event.hidden} for hidden states, {event.gradient} for gradients"
                self._say(f"{event.client}: {codecs} ({event.reason})")
            case StepDone():
                self._draw(event)
            case Evaluated():
                self._say(self._evaluation(event))
            case PrivacySpent() if math.isfinite(event.epsilon):
                self._say(f"round {event.round}: spent epsilon {event.epsilon:.3g} at delta {event.delta:g}")
            case Warned() | SiteChanged():
                self._say(f"warning: {event.message}")
            case SessionStarted():
                self._say(f"from round {event.round} on with {', '.join(event.sites)}")
            case _:
                pass

    def _count(self, event: Event) -> None:
        """Update how far the run is."""
        match event:
            case RunStarted():
                self._started = event
                self._done, self._total = 0, event.rounds * event.steps * len(event.clients)
            case RunResumed() if self._started:
                a_round = self._total // self._started.rounds
                self._done = (event.round - 1) * a_round
                self._recent.clear()
            case StepDone():
                self._done += 1
                self._recent.append(event)
                while event.t - self._recent[0].t > _WINDOW_S:
                    self._recent.popleft()
            case RoundDone() if self._started:
                left = self._started.rounds - event.round
                self._total = self._done + left * self._started.steps * len(event.participants)
            case Evaluated():
                self._recent.clear()  # a pause that is not training
                if self._first_loss is None:
                    self._first_loss = event.loss
            case _:
                pass

    def _draw(self, step: StepDone) -> None:
        """Move the bar, or write a plain line when it is time for one."""
        rounds = self._started.rounds if self._started else step.round
        where, note = f"round {step.round}/{rounds}", self._note(step)
        if self._console.is_terminal:
            self._bar.update(
                self._task, description=where, completed=self._done, total=self._total, note=note
            )
        elif step.t - self._last_line_t >= _PLAIN_EVERY_S:
            self._last_line_t = step.t
            self._say(f"{where}: {note}")

    def _note(self, step: StepDone) -> str:
        """Step, tokens/s, loss and time left."""
        parts = [f"step {self._done}/{self._total or '?'}"]
        seconds = step.t - self._recent[0].t
        if seconds > 0:
            tokens = sum(one.tokens for one in self._recent) - self._recent[0].tokens
            steps_per_s = (len(self._recent) - 1) / seconds
            left = max(self._total - self._done, 0) / steps_per_s
            parts += [f"{tokens / seconds:.0f} tokens/s", f"loss {step.loss:.3f}", f"{clock(left)} left"]
        else:
            parts.append(f"loss {step.loss:.3f}")
        return " · ".join(parts)

    def _evaluation(self, event: Evaluated) -> str:
        when = "before training" if event.round == 0 else f"after round {event.round}"
        change = f" (before training {self._first_loss:.3f})" if event.round and self._first_loss else ""
        return f"{when}: held-out loss {event.loss:.3f}{change}"

    def _say(self, line: str) -> None:
        """A line that stays, above the bar."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=not self._console.is_terminal)


def client_table(summary: dict[str, Any]) -> Table:
    """The table at the end of a run: what each client trained, gained and sent."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for index, heading in enumerate(CLIENT_HEADINGS):
        table.add_column(heading, justify="right" if index else "left")
    for row in client_rows(summary):
        table.add_row(*map(escape, row))
    return table
