"""Run the FLARE process of one startup kit, and keep it running.

    kit --start--> python -m nvflare...server_train | client_train, in the kit's folder
                   that process starts one more for each job

A process that dies is started again, more slowly each time. Ending a kit ends its jobs too: whatever runs
with the kit's folder on its command line, and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil

from splitft.deploy.flare.provisioning import PROJECT, party_of, settle
from splitft.deploy.flare.times import STOP_S
from splitft.errors import DeployError

CONSOLE = "console.txt"
"""Where a kit's process writes what it says."""
_MODULES = {"server": "server.server_train", "client": "client.client_train"}
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0
"""Between the end of a process and its next start."""


class Service:
    """One kit's process."""

    def __init__(self, kit: Path, environment: dict[str, str] | None = None) -> None:
        """Make the kit ready."""
        self.kit = kit.resolve()
        self.kind, self.party = settle(self.kit), party_of(self.kit)
        self.environment = dict(environment or {})
        """Added to this process's own when it is started."""
        self._process: subprocess.Popen[bytes] | None = None
        self._pause_s, self._again_at = FIRST_PAUSE_S, 0.0

    def start(self) -> None:
        """Start the process."""
        arguments = [
            sys.executable, "-u", "-m", f"nvflare.private.fed.app.{_MODULES[self.kind]}",
            "-m", str(self.kit), "-s", f"fed_{self.kind}.json", "--set", "secure_train=true",
            *([f"uid={self.party}"] if self.kind == "client" else []),
            f"org={PROJECT}", "config_folder=config",
        ]  # fmt: skip
        with (self.kit / CONSOLE).open("ab") as console:
            self._process = subprocess.Popen(
                arguments,
                cwd=self.kit,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for whoever keeps the services, not for them
            )

    def tend(self) -> bool:
        """Start the process again if it died and its pause is over; returns whether it runs."""
        if self._process is not None and self._process.poll() is None:
            return True
        now = time.monotonic()
        if not self._again_at:
            self._again_at = now + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        elif now >= self._again_at:
            self._again_at = 0.0
            self.end_jobs()
            self.start()
            return True
        return False

    @property
    def pid(self) -> int | None:
        """The process, if it was started."""
        return None if self._process is None else self._process.pid

    def end_jobs(self) -> None:
        """End what is left of an earlier process."""
        _end(processes_of(self.kit), 0)

    def stop(self) -> None:
        """End the process and its jobs."""
        _end(processes_of(self.kit), STOP_S / 4)
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)


def processes_of(kit: Path) -> list[psutil.Process]:
    """Every FLARE process that runs out of this kit."""
    found, own = [], str(kit.resolve())
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()
            if any("nvflare." in part for part in line) and own in line:
                found.append(process)
    return found


def keep_running(kit: Path) -> None:
    """Run a kit until Ctrl-C. Raises DeployError if it cannot be."""
    service = Service(kit)
    if processes_of(service.kit):
        raise DeployError(f"{kit} is running already")
    with ending_on_signals():
        service.start()
        try:
            while True:
                service.tend()
                time.sleep(1.0)
        finally:
            service.stop()


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """Let SIGTERM end what is done here as Ctrl-C does, so that no process is left."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(processes: list[psutil.Process], grace_s: float) -> None:
    """Ask them to end, and end those that do not."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate() if grace_s else process.kill()
    _, alive = psutil.wait_procs(processes, timeout=grace_s or STOP_S)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=STOP_S)
