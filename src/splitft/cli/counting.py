"""How far something countable is, on the terminal: one bar a name, or plain lines in a log.

e2e          ━━━━━━━━━━━╸            61 %  78/128  0:00:31 left
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TaskProgressColumn, TextColumn
from rich.progress import Progress as RichProgress

from splitft.tracking.summary import clock

_PLAIN_EVERY_S = 5.0
"""At most one plain line of progress in this many seconds."""


class Counting:
    """Told `(name, done, total)`; a context manager, so that the terminal is left as it was."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._last_line = float("-inf")

    def __enter__(self) -> Counting:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def __call__(self, name: str, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        now = time.monotonic()
        began, before = self._began.setdefault(name, (now, done))  # what was done before took no time here
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

    def say(self, line: str) -> None:
        """A line that stays, above the bars."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=not self._console.is_terminal)

    def drop(self, name: str) -> None:
        """Take a bar away."""
        if name in self._tasks:
            self._bars.remove_task(self._tasks.pop(name))
