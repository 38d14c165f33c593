"""A whole federation on this machine: real processes, real certificates, one run, and nothing left behind.

    kits in a folder of their own --> a server's and each site's process --> chain of links --> the run folder

Everything lives in a temporary folder, which goes when the run is over, however it ends; the logs of all
processes stay in `logs/` of the run folder. No file of the user's own FLARE is read or written, and the port
is one that is free, so that federations do not disturb one another.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from splitft.config import RunConfig
from splitft.deploy.common import common_of, site_names
from splitft.deploy.flare.admin import Console
from splitft.deploy.flare.engine import FlareFederation, Follower, explain_away
from splitft.deploy.flare.job import RUNS
from splitft.deploy.flare.processes import CONSOLE, Service, ending_on_signals
from splitft.deploy.flare.provisioning import Kits, provision
from splitft.deploy.flare.times import START_S
from splitft.deploy.supervisor import supervise
from splitft.errors import DeployError
from splitft.run.folder import Run, find_snapshot
from splitft.tracking.events import Listener

HOST = "localhost"


class Poc:
    """The federation's processes."""

    def __init__(self, folder: Path, sites: Sequence[str], runs: Path) -> None:
        """Make kits in `folder`; runs are kept in `runs`."""
        self.kits: Kits = provision(folder / "kits", HOST, free_port(), sites)
        environment = {RUNS: str(runs.resolve()), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        self.server = Service(self.kits.of(HOST), environment)
        site_environment = {**environment, RUNS: str(folder / "sites")}
        self.sites = {name: Service(self.kits.of(name), site_environment) for name in sites}

    @property
    def services(self) -> tuple[Service, ...]:
        """All of them, the server first."""
        return (self.server, *self.sites.values())

    def start(self, console: Console) -> None:
        """Start all processes and wait for their connections. Raises DeployError if one does not come up."""
        for service in self.services:
            service.start()
        until = time.monotonic() + START_S
        connected: set[str] = set()
        while connected < set(self.sites):
            with contextlib.suppress(DeployError):
                connected = console.connected()
            if time.monotonic() > until:
                missing = sorted(set(self.sites) - connected)[0] if connected else HOST
                text = (self.kits.of(missing) / CONSOLE).read_text(encoding="utf-8", errors="replace")
                raise explain_away(missing, text)
            time.sleep(0.5)

    def tend(self) -> None:
        """Start again what died."""
        for service in self.services:
            service.tend()

    def stop(self) -> None:
        """End all processes, all at once."""
        threads = [threading.Thread(target=service.stop) for service in self.services]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def save_logs(self, to: Path) -> None:
        """Copy what every process and job has said."""
        to.mkdir(parents=True, exist_ok=True)
        for service in self.services:
            for log in (service.kit / CONSOLE, *service.kit.glob("*/log.txt")):
                job = "" if log.parent == service.kit else f"-{log.parent.name[:8]}"
                if log.is_file():
                    shutil.copy(log, to / f"{service.party}{job}.txt")


def run_poc(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    listeners: Sequence[Listener] = (),
    say: Callable[[str], None] = lambda line: None,
    tell: Callable[[str, Mapping[str, Any]], None] | None = None,
) -> Run:
    """Run the configuration over real processes on this machine, into `out`, as `train` would.

    Raises what `train` raises, and DeployError if the federation cannot be kept running.
    """
    config = _as_others_read_it(config)
    sites = site_names(config)
    common_of(config)  # what cannot be is said before anything is started
    find_snapshot(out, config, resume)
    with ending_on_signals(), tempfile.TemporaryDirectory(prefix="splitft-poc-") as scratch:
        folder = Path(scratch)
        poc = Poc(folder, sites, out.parent)
        follower = Follower(out / "events.jsonl", listeners)

        def tend() -> None:
            poc.tend()
            follower.look()

        try:
            with Console(poc.kits.admin) as console:
                say(f"starting a server and {len(sites)} sites")
                poc.start(console)
                federation = FlareFederation(console, out.name, config, folder, out, False, tend)
                supervise(federation, sites, config.deploy.min_clients, config.deploy.join_s, say, tell)
        finally:
            poc.stop()
            if out.is_dir():
                poc.save_logs(out / "logs")
            follower.look()
    return Run(out)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _as_others_read_it(config: RunConfig) -> RunConfig:
    """With full paths, since other processes have other working folders."""
    model, data = config.model, config.data
    if Path(model.name).exists():
        model = model.model_copy(update={"name": str(Path(model.name).resolve())})
    if Path(data.source).exists():
        data = data.model_copy(update={"source": str(Path(data.source).resolve())})
    return config.model_copy(update={"model": model, "data": data})
