"""Run the FLARE process of one startup kit, and restart it when it dies.

    kit --start--> python -m splitft.deploy.flare.party, in the kit's folder
                   that process starts one more for each job

The pause before a restart doubles each time. Stopping a kit stops its jobs too: every FLARE process with the
kit's folder on its command line, and nothing else. What the processes write, only their owner can read.
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

from splitft.deploy.flare.job_store import settle_jobs
from splitft.deploy.flare.provisioning import PROJECT, prepare_kit
from splitft.deploy.identity.certificates import check_kit

CONSOLE = "console.txt"
"""File in a kit with the output of its process."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0
"""Pause between the end of a process and its restart."""
STOP_S = 20.0
"""A process is killed if it has not ended by itself after this long."""
_PARTY = "splitft.deploy.flare.party"
_PRIVATE = 0o077
"""Permissions that files of the processes do not get."""


class Service:
    """The process of one kit."""

    def __init__(self, kit: Path, environment: dict[str, str] | None = None) -> None:
        """Prepare the kit to run where it is. Raises DeployError if it is none, or its certificate ended."""
        self.kit = kit.resolve()
        self.kind = prepare_kit(self.kit)
        self.party = check_kit(self.kit).name
        self.environment = dict(environment or {})
        """Environment variables of the process, beside those of this one."""
        self._process: subprocess.Popen[bytes] | None = None
        self._pause_s, self._restart_at = FIRST_PAUSE_S, 0.0

    def start(self) -> None:
        """Start the process; jobs that an earlier one has left unfinished are settled before."""
        if self.kind == "server":
            settle_jobs(self.kit)
        arguments = [
            sys.executable, "-u", "-m", _PARTY, self.kind,
            "-m", str(self.kit), "-s", f"fed_{self.kind}.json", "--set", "secure_train=true",
            *([f"uid={self.party}"] if self.kind == "client" else []),
            f"org={PROJECT}", "config_folder=config",
        ]  # fmt: skip
        with open(
            self.kit / CONSOLE, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)
        ) as console:
            self._process = subprocess.Popen(
                arguments,
                cwd=self.kit,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this process, which then stops the others
                umask=_PRIVATE,
            )

    def restart_if_dead(self) -> bool:
        """Restart the process if it died and its pause is over; returns whether it runs."""
        if self._process is not None and self._process.poll() is None:
            return True
        now = time.monotonic()
        if not self._restart_at:
            self._restart_at = now + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        elif now >= self._restart_at:
            self._restart_at = 0.0
            _end(processes_of(self.kit), 0)  # jobs that the dead process has left
            self.start()
            return True
        return False

    @property
    def pid(self) -> int | None:
        """Id of the process, if it was started."""
        return None if self._process is None else self._process.pid

    def stop(self) -> None:
        """Stop the process and its jobs."""
        found = set(processes_of(self.kit))
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):  # just started, it may show no command line yet
                found.add(psutil.Process(self._process.pid))
        _end(list(found), STOP_S / 4)
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)


def processes_of(kit: Path) -> list[psutil.Process]:
    """Return every FLARE process that runs from this kit."""
    found, own = [], str(kit.resolve())
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if own in words and any("nvflare." in word or word == _PARTY for word in words):
                found.append(process)
    return found


@contextlib.contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt as Ctrl-C does, so that no process is left."""
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
    """Terminate processes, and kill those that are alive after `grace_s`."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate() if grace_s else process.kill()
    _, alive = psutil.wait_procs(processes, timeout=grace_s or STOP_S)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=STOP_S)
