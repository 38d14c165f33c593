"""Progress on the terminal: of a run, of anything that is counted, and of a finished run.

    Progress      round 2/3 ━━━━━━━━━━━╸          61%  step 74/120 · 486 tokens/s · loss 2.713 · 0:00:31 left
    ProgressBars  e2e       ━━━━━━━━━━━╸          61%  78/128  0:00:31 left

A terminal shows moving bars; a pipe or a log file gets plain lines a few seconds apart. The speed of a run is
that of labeled tokens and steps over the last seconds of training, by the events' own clock, so that
evaluation and aggregation do not count.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
)
from rich.progress import Progress as RichProgress

from splitft.cli.app import say
from splitft.foreign_text import printable_lines
from splitft.tracking.events import (
    CutsChanged,
    Evaluated,
    Event,
    PrivacySpent,
    RoundDone,
    RoundUndone,
    RunResumed,
    RunStarted,
    SessionStarted,
    SiteChanged,
    StepDone,
    UpdatesBounded,
    Warned,
    WireChosen,
)
from splitft.tracking.log import settled
from splitft.tracking.summary import client_table, clock, headline

if TYPE_CHECKING:
    from splitft.run.folder import Run

_WINDOW_S = 20.0
"""Seconds of training over which speeds are taken."""
_PLAIN_EVERY_S = 5.0
"""Seconds between plain lines of progress."""


class _Display:
    """Bars on a terminal; a context manager, so that the terminal is left as it was."""

    def __init__(self, console: Console, *columns: ProgressColumn) -> None:
        self._console = console
        self._bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            *columns,
            console=console,
            transient=True,
        )

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def say(self, line: str) -> None:
        """Print a line above the bars; a terminal breaks it at its width, a pipe gets it as one line."""
        text = printable_lines(line)
        self._console.print(text, markup=False, highlight=False, soft_wrap=not self._console.is_terminal)


class Progress(_Display):
    """A listener that shows a run: `with Progress(console) as progress: train(..., [progress])`."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, TextColumn("{task.fields[note]}"))
        self._task = self._bars.add_task("reading the model and the text", total=None, note="")
        self._started: RunStarted | None = None
        self._done = 0
        self._total = 0
        self._first_loss: float | None = None
        self._recent: deque[StepDone] = deque()
        self._last_line_t = float("-inf")

    def remember(self, events: Iterable[Event]) -> None:
        """Count the events of an earlier process of this run, without drawing them."""
        for event in settled(events):
            self._count(event)
        self._recent.clear()

    def __call__(self, event: Event) -> None:
        """Count an event and show it."""
        self._count(event)
        match event:
            case RunStarted():
                model = f"{event.model} in {event.precision}" if event.precision else event.model
                about = f"{event.method}: {model}, {event.blocks} blocks, {len(event.clients)} clients"
                about += f"; {event.devices}" if event.devices else ""
                self.say(" ".join([f"{about}. {event.privacy}", *event.defences]))
            case RunResumed():
                self.say(f"continuing with round {event.round}")
            case CutsChanged():
                cuts = ", ".join(f"{name} {cut}" for name, cut in event.cuts.items())
                reason = f" ({event.reason})" if event.reason else ""
                self.say(f"round {event.round}: cuts {cuts}{reason}")
            case WireChosen():
                codecs = f"{event.hidden} for hidden states, {event.gradient} for gradients"
                self.say(f"{event.client}: {codecs} ({event.reason})")
            case StepDone():
                self._draw(event)
            case Evaluated():
                self.say(self._evaluation(event))
                for warning in event.warnings:
                    self.say(f"warning: {warning}")
            case PrivacySpent() if math.isfinite(event.epsilon):
                self.say(f"round {event.round}: spent epsilon {event.epsilon:.3g} at delta {event.delta:g}")
            case Warned() | SiteChanged() | UpdatesBounded() | RoundUndone():
                self.say(f"warning: {event.message}")
            case SessionStarted():
                self.say(f"from round {event.round} on with {', '.join(event.sites)}")
            case _:
                pass

    def _count(self, event: Event) -> None:
        """Update the counts."""
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
        """Move the bar, or print a plain line when one is due."""
        rounds = self._started.rounds if self._started else step.round
        where, note = f"round {step.round}/{rounds}", self._note(step)
        if self._console.is_terminal:
            self._bars.update(
                self._task, description=where, completed=self._done, total=self._total, note=note
            )
        elif step.t - self._last_line_t >= _PLAIN_EVERY_S:
            self._last_line_t = step.t
            self.say(f"{where}: {note}")

    def _note(self, step: StepDone) -> str:
        """Return step, tokens/s, loss and time left."""
        parts = [f"step {self._done}/{self._total or '?'}"]
        loss = "loss not reported" if step.loss is None else f"loss {step.loss:.3f}"
        seconds = step.t - self._recent[0].t
        if seconds > 0:
            tokens = sum(one.tokens for one in self._recent) - self._recent[0].tokens
            steps_per_s = (len(self._recent) - 1) / seconds
            left = max(self._total - self._done, 0) / steps_per_s
            parts += [f"{tokens / seconds:.0f} tokens/s", loss, f"{clock(left)} left"]
        else:
            parts.append(loss)
        return " · ".join(parts)

    def _evaluation(self, event: Evaluated) -> str:
        when = "before training" if event.round == 0 else f"after round {event.round}"
        change = f" (before training {self._first_loss:.3f})" if event.round and self._first_loss else ""
        right = "" if event.accuracy is None else f", token accuracy {100 * event.accuracy:.1f} %"
        return f"{when}: held-out loss {event.loss:.3f}{change}{right}"


class ProgressBars(_Display):
    """One bar for each name; called with `(name, done, total)`."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._last_line = float("-inf")

    def __call__(self, name: str, done: int, total: int) -> None:
        """Show that `done` of `total` are done, and the time left."""
        now = time.monotonic()
        began, before = self._began.setdefault(name, (now, done))  # earlier work took no time here
        left = ""
        if done > before and now > began:
            left = f"{clock((now - began) / (done - before) * (total - done))} left"
        if self._console.is_terminal:
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=total, left="")
            self._bars.update(self._tasks[name], completed=done, total=total, left=left)
        elif now - self._last_line >= _PLAIN_EVERY_S or done == total:
            self._last_line = now
            line = f"{name}: {done}/{total}{f' · {left}' if left and done < total else ''}"
            self.say(line)

    def drop(self, name: str) -> None:
        """Remove a bar."""
        if name in self._tasks:
            self._bars.remove_task(self._tasks.pop(name))


def show_outcome(console: Console, run: Run, *others: str) -> None:
    """Print what a finished run reached, its files, and other lines."""
    console.print()
    console.print(client_table(run.summary).to_rich())
    lines = (
        f"\n{headline(run.summary)}",
        f"Report   {run.folder / 'report.html'}",
        f"Adapter  {run.adapter_dir} (PEFT)",
    )
    say(console, *lines, *others)
