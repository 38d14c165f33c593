"""Run a whole federation on this machine: real processes and certificates, one run, nothing left behind.

    kits in a temporary folder --> a process of the server and of each site --> sessions --> the run folder

The temporary folder is deleted when the run ends, however it ends; the logs of all processes stay in `logs/`
of the run folder. No file of the user's own FLARE is read or written, and the port is a free one, so
federations do not disturb one another.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from splitft.config import RunConfig
from splitft.deploy.flare.admin import Console
from splitft.deploy.flare.engine import FlareEngine, FlareRun, Follower
from splitft.deploy.flare.job import RUN_FOLDER, RUNS, owner_folder
from splitft.deploy.flare.processes import CONSOLE, Service, interrupt_on_sigterm
from splitft.deploy.flare.provisioning import Kits, provision
from splitft.deploy.run_terms import load_run_terms, site_names
from splitft.deploy.supervisor import OnStatus, supervise
from splitft.errors import DeployError
from splitft.names import file_safe_name
from splitft.plugins import PluginFile, keep_copies
from splitft.run.folder import Run, find_snapshot
from splitft.run.lock import check_free
from splitft.tracking.events import Listener

HOST = "localhost"
START_S = 180.0
"""Longest time until all sites of the federation are connected."""


class Poc:
    """The processes of a federation on this machine."""

    def __init__(
        self, folder: Path, sites: Sequence[str], runs: Path, run_folder: Path | None = None
    ) -> None:
        """Make kits in `folder`; runs are kept in `runs`, or the only one in `run_folder`."""
        self.kits: Kits = provision(folder / "kits", HOST, free_port(), sites)
        environment = {RUNS: str(runs.resolve()), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        only = {} if run_folder is None else {RUN_FOLDER: str(run_folder.resolve())}
        self.server = Service(self.kits.of(HOST), {**environment, **only})
        site_environment = {**environment, RUNS: str(folder / "sites")}
        self.sites = {name: Service(self.kits.of(name), site_environment) for name in sites}

    @property
    def services(self) -> tuple[Service, ...]:
        """The server's process and the sites'."""
        return (self.server, *self.sites.values())

    def start(self, console: Console) -> None:
        """Start all processes and wait until the sites are connected. Raises DeployError if one fails."""
        for service in self.services:
            service.start()
        deadline = time.monotonic() + START_S
        connected: set[str] = set()
        while connected < set(self.sites):
            with contextlib.suppress(DeployError):
                connected = console.connected()
            if time.monotonic() > deadline:
                missing = sorted(set(self.sites) - connected)[0] if connected else HOST
                text = (self.kits.of(missing) / CONSOLE).read_text(encoding="utf-8", errors="replace")
                output = [line for line in text.splitlines() if line.strip()][-3:]
                raise DeployError(f"{missing} did not start: {' | '.join(output) or 'it has no output'}")
            time.sleep(0.5)

    def restart_dead(self) -> None:
        """Restart the processes that died."""
        for service in self.services:
            service.restart_if_dead()

    def stop(self) -> None:
        """Stop all processes at once."""
        threads = [threading.Thread(target=service.stop) for service in self.services]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def save_logs(self, to: Path) -> None:
        """Copy the logs of every process and job."""
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
    on_status: OnStatus | None = None,
) -> Run:
    """Run the configuration over real processes on this machine, into `out`, as `train` would.

    Raises what `train` raises, and DeployError if the federation cannot be kept running.
    """
    config = _with_full_paths(config)
    sites = site_names(config)
    load_run_terms(config)  # errors of the configuration come before any process is started
    check_free(out)
    find_snapshot(out, config, resume)
    with interrupt_on_sigterm(), tempfile.TemporaryDirectory(prefix="splitft-poc-") as scratch:
        folder = Path(scratch)
        poc = Poc(folder, sites, out.parent, out)
        follower = Follower(out / "events.jsonl", listeners)

        def on_poll() -> None:
            poc.restart_dead()
            follower.poll()

        try:
            with Console(poc.kits.submitter) as console:
                for service in poc.services:  # all of them are this user's own
                    keep_copies(
                        (PluginFile(Path(one.file), one.sha256 or "") for one in config.plugins),
                        owner_folder(str(service.kit)),
                    )
                say(f"starting a server and {len(sites)} sites")
                poc.start(console)
                engine = FlareEngine(
                    console,
                    FlareRun(file_safe_name(out.resolve().name), config, folder, out, fetch=False),
                    on_poll,
                )
                supervise(engine, sites, config.deploy.min_clients, config.deploy.join_s, say, on_status)
        finally:
            poc.stop()
            if out.is_dir():
                poc.save_logs(out / "logs")
            follower.poll()
    return Run(out)


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _with_full_paths(config: RunConfig) -> RunConfig:
    """Return the configuration with absolute paths, since other processes have other working folders."""
    model, data = config.model, config.data
    if Path(model.name).exists():
        model = model.model_copy(update={"name": str(Path(model.name).resolve())})
    if Path(data.source).exists():
        data = data.model_copy(update={"source": str(Path(data.source).resolve())})
    return config.model_copy(update={"model": model, "data": data})
