"""A federation on this machine as people run it: `deploy start` for each kit, `deploy submit` for a run."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from laws.federations import write_text
from runs import COMMAND, settings, started
from splitft.deploy.flare.poc import free_port
from splitft.deploy.flare.processes import processes_of
from splitft.deploy.flare.provisioning import Kits, provision
from splitft.tracking.log import read_events

SITES = ("north", "south")


class LocalFederation:
    """Its kits, its processes, and what can happen to them."""

    def __init__(self, folder: Path, kits: Kits):
        self.folder, self.kits, self.services, self.submits = folder, kits, {}, []

    def start(self, party: str, **options: Any) -> None:
        """`deploy start` of a kit."""
        self.services[party] = started("deploy", "start", self.kits.of(party), cwd=self.folder, **options)

    def stop(self, party: str) -> None:
        service = self.services.pop(party)
        service.terminate()
        service.communicate(timeout=90)

    def submit(self, name: str, *words: object) -> subprocess.Popen[str]:
        """`deploy submit` of the run `name`."""
        one = started(
            "deploy", "submit", self.folder / "run.yaml", *words, "--kit", self.kits.submitter,
            "--out", f"copies/{name}", cwd=self.folder,
        )  # fmt: skip
        self.submits.append(one)
        return one

    def run_folder(self, name: str) -> Path:
        """The run's folder on the server."""
        return self.kits.of("localhost") / "runs" / name

    def processes(self, party: str, job: bool) -> list[psutil.Process]:
        """A kit's own FLARE process, or those of its jobs."""
        kit, found = self.kits.of(party), []
        for one in processes_of(kit):
            with contextlib.suppress(psutil.Error):
                if (one.ppid() != self.services[party].pid) == job:
                    found.append(one)
        return found

    def signal(self, number: signal.Signals, processes: list[psutil.Process]) -> None:
        assert processes
        for one in processes:
            with contextlib.suppress(psutil.Error):
                one.send_signal(number)

    def events(self, name: str, kind: str) -> list[Any]:
        """Events of a run on the server."""
        path = self.run_folder(name) / "events.jsonl"
        return [one for one in read_events(path) if one.event == kind] if path.is_file() else []

    def until(self, true, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.2)

    def until_step(self, name: str, round: int, step: int = 10) -> None:
        """Wait until a round of a run is underway."""
        self.until(lambda: len([e for e in self.events(name, "StepDone") if e.round == round]) >= step)

    def status(self) -> dict[str, Any]:
        """What `deploy status --json` says; nothing while it cannot say anything."""
        done = subprocess.run(
            [*COMMAND, "deploy", "status", "--kit", str(self.kits.submitter), "--json"],
            cwd=self.folder, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        return json.loads(done.stdout) if done.returncode == 0 else {}


@contextlib.contextmanager
def local_federation(folder: Path, model: Path, **sections: Any) -> Iterator[LocalFederation]:
    """Make kits for a server and two sites, each with a text of its own, and start them."""
    kits = provision(folder / "kits", "localhost", free_port(), SITES)
    made = LocalFederation(folder, kits)
    given = {
        "clients": {"count": 2, "cuts": [1, 2]},
        "training": {"rounds": 4, "steps": 60},
        "deploy": {"sites": list(SITES), "min_clients": 2, "silence_s": 10, "join_s": 60},
    }
    run = settings(
        model, "python-docs", **{k: {**given.get(k, {}), **sections.get(k, {})} for k in {*given, *sections}}
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    for name in SITES:
        own = write_text(folder / f"{name}.jsonl", seed=SITES.index(name))
        (kits.of(name) / "local/site.yaml").write_text(yaml.safe_dump({"text": {"source": str(own)}}))
    try:
        for party in ("localhost", *SITES):
            made.start(party)
        yield made
    finally:
        for one in made.submits:  # of a test that failed
            one.kill()
            one.communicate()
        for party in list(made.services):
            made.stop(party)
        assert not any(processes_of(kits.of(party)) for party in ("localhost", *SITES))
