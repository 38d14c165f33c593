"""A federation of real processes on this machine, with some sites behind a slow link.

    site --> SlowLine: delay, rate, outages --> server        near sites connect directly

Certificates, transport and processes are those of `splitft deploy poc`; only the port in a far site's kit
differs. For `deployment.py`, `in_flight.py` and `throughput.py`.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from slow_line import SlowLine

RUNS = "runs"
"""Folder of the server's runs, in the federation's folder."""


@dataclass(frozen=True)
class Ground:
    """A running federation."""

    folder: Path
    console: Any
    poc: Any
    lines: dict[str, SlowLine] = field(default_factory=dict)
    """Links of the far sites."""

    @property
    def runs(self) -> Path:
        """Folder of the run folders."""
        return self.folder / RUNS


@contextlib.contextmanager
def federation(
    folder: Path, near: Sequence[str], far: Sequence[str] = (), classes: Sequence[str] = ()
) -> Iterator[Ground]:
    """Start a federation, and stop its processes at exit; jobs may use classes with the prefixes
    `classes`."""
    from splitft.deploy.flare.admin import Console
    from splitft.deploy.flare.poc import Poc

    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    poc = Poc(folder, (*near, *far), folder / RUNS)
    lines = {name: behind_a_line(poc.kits.of(name)) for name in far}
    for service in poc.services if classes else ():
        path = service.kit / "local" / "resources.json"
        resources = json.loads(path.read_text(encoding="utf-8"))
        resources["class_allow_list"].extend(classes)
        path.write_text(json.dumps(resources), encoding="utf-8")
    try:
        with Console(poc.kits.submitter) as console:
            poc.start(console)
            yield Ground(folder, console, poc, lines)
    finally:
        poc.stop()
        for line in lines.values():
            line.close()


def behind_a_line(kit: Path) -> SlowLine:
    """Connect a site to the server through a slow link."""
    startup = kit / "startup" / "fed_client.json"
    said = json.loads(startup.read_text(encoding="utf-8"))
    host, port = said["servers"][0]["service"]["target"].split(":")
    line = SlowLine(int(port))
    said["servers"][0]["service"]["target"] = f"{host}:{line.port}"
    startup.write_text(json.dumps(said), encoding="utf-8")
    return line


def ended(console: Any, job: str, within_s: float) -> str:
    """Return FLARE's final state of a job. Raises SystemExit on timeout."""
    until = time.monotonic() + within_s
    while not (state := console.state(job)).startswith("FINISHED"):
        if time.monotonic() > until:
            raise SystemExit(f"job {job} did not end within {within_s:g} s: {state}")
        time.sleep(0.3)
    return str(state)


class Busy:
    """Samples the processor time of each kind of process, ten times a second."""

    KINDS = ("FLARE's server process", "our server's job", "sites")

    def __init__(self, ground: Ground) -> None:
        self._server = str(ground.poc.server.kit)
        self._all = [str(service.kit) for service in ground.poc.services]
        self._notes: list[tuple[float, tuple[float, ...]]] = []
        self._known: dict[int, tuple[psutil.Process, int]] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop sampling."""
        self._done.set()
        self._thread.join()

    def cores(self, began: float, ended: float) -> dict[str, float]:
        """Return the mean cores that each kind used between two times of `time.time()`."""
        times = [when for when, _ in self._notes]
        first, last = bisect.bisect_left(times, began), bisect.bisect_right(times, ended) - 1
        (t0, before), (t1, after) = self._notes[first], self._notes[last]
        return {kind: (b - a) / (t1 - t0) for kind, a, b in zip(self.KINDS, before, after, strict=True)}

    def _watch(self) -> None:
        looks = 0
        while not self._done.wait(0.1):
            if looks % 20 == 0:
                self._find()
            looks += 1
            used = [0.0, 0.0, 0.0]
            for process, kind in self._known.values():
                with contextlib.suppress(psutil.Error):
                    spent = process.cpu_times()
                    used[kind] += spent.user + spent.system
            self._notes.append((time.time(), tuple(used)))

    def _find(self) -> None:
        """Find new processes; those of jobs come and go."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid in self._known:
                    continue
                line = process.cmdline()
                if any("nvflare." in word for word in line) and any(kit in line for kit in self._all):
                    job = any("runner_process" in word for word in line)
                    self._known[process.pid] = (process, 2 if self._server not in line else int(job))
