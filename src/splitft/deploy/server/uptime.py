"""Measure time in which this process was running, for everything that judges others by their silence.

    monotonic clock   |--running--|......stopped......|--running--|
    uptime            |--running--||--running--|

A server that was stopped (SIGSTOP, a closed lid, a host that moves the machine) has heard nobody meanwhile,
and that is not its sites' fault. A thread reads the clock every `TICK_S`; a far longer gap between two
readings is a pause of the whole process and does not count.
"""

from __future__ import annotations

import threading
import time

TICK_S = 0.5
PAUSE_S = 5.0
"""A gap from this length on is a pause; a busy machine may delay the thread by less."""


class Uptime:
    """A clock that stands still while the process is stopped."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read_s: float | None = None
        self._paused_s = 0.0

    def now(self) -> float:
        """Return seconds on the monotonic clock, without pauses."""
        with self._lock:
            now = time.monotonic()
            if self._read_s is None:
                self._read_s = now
                threading.Thread(target=self._tick, name="uptime", daemon=True).start()
            if now - self._read_s > PAUSE_S:
                self._paused_s += now - self._read_s
            self._read_s = now
            return now - self._paused_s

    @property
    def paused_s(self) -> float:
        """Seconds of all pauses so far."""
        with self._lock:
            return self._paused_s

    def _tick(self) -> None:
        while True:
            time.sleep(TICK_S)
            self.now()


UPTIME = Uptime()
"""The clock of this process."""
