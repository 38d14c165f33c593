"""Run a kit until it is told to end, and tell its operator what there is to know.

console.txt of the process --lines `splitft: ...`--> terminal or service log
not connected for 10 s ----probe of the server-----> why, and what to do
certificates ------------------once a day----------> a warning from 30 days before the end
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

from splitft.deploy.flare.connections import CONNECTED, LOST, MARK, REFUSED
from splitft.deploy.flare.processes import CONSOLE, Service, interrupt_on_sigterm, processes_of
from splitft.deploy.flare.pruning import prune
from splitft.deploy.identity.certificates import certificate_of, root_of, warnings_of
from splitft.deploy.identity.probe import explain
from splitft.deploy.prometheus import HOST, STATUS_FOLDER, MetricsServer
from splitft.errors import DeployError

logger = logging.getLogger(__name__)

EXPLAIN_S = 10.0
"""After this long without a connection to the server, its likely reason is said."""
PRUNE_S = 600.0
"""Old jobs are deleted this often."""
AGAIN_S, DAY_S = 300.0, 86400.0
"""The same reason is said again after this long, and a warning about certificates after a day."""


class Reporter:
    """Tells an operator what happens to the process of a kit."""

    def __init__(self, service: Service, tell: Callable[[str], None]) -> None:
        self._service, self._tell = service, tell
        path = service.kit / CONSOLE
        self._console = path
        self._position = path.stat().st_size if path.is_file() else 0
        self._connected = service.kind == "server"  # a server connects to nobody
        self._alone_since = time.monotonic()
        self._said, self._said_at, self._warned_at = "", 0.0, -DAY_S

    def report(self) -> None:
        """Tell what is new. Raises DeployError if the server has refused this process for good."""
        for line in self._new_lines():
            self._tell(line)
            if line.startswith(CONNECTED):
                self._connected, self._said = True, ""
            elif line.startswith(LOST):
                self._connected, self._alone_since = False, time.monotonic()
            elif line.startswith(REFUSED):
                raise DeployError(f"{line.removeprefix(REFUSED).strip()}; run one process for each kit")
        now = time.monotonic()
        if not self._connected and now - self._alone_since > EXPLAIN_S:
            self._explain(now)
        if now - self._warned_at > DAY_S:
            self._warned_at = now
            for line in warnings_of((certificate_of(self._service.kit), root_of(self._service.kit))):
                self._tell(f"warning: {line}")

    def _explain(self, now: float) -> None:
        """Tell why there is no connection, if the reason is new or was not told for a while."""
        self._alone_since = now  # ask again after a while
        reason = explain(self._service.kit)
        if reason is None:
            reason = "the server can be reached, and has not admitted this site yet; its log may say why"
        if reason != self._said or now - self._said_at > AGAIN_S:
            self._said, self._said_at = reason, now
            self._tell(f"not connected: {reason}")

    def _new_lines(self) -> list[str]:
        """Return the lines for the operator that the process has written since the last call."""
        if not self._console.is_file():
            return []
        with self._console.open("rb") as file:
            file.seek(self._position)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._position += len(whole)
        lines = whole.decode("utf-8", errors="replace").splitlines()
        return [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]


class Housekeeper:
    """Deletes what FLARE keeps of old jobs, now and then."""

    def __init__(self, kit: Path) -> None:
        self._kit, self._tidied_at = kit, -PRUNE_S

    def tidy(self) -> None:
        """Prune the kit if it was not done for a while; a folder that cannot be deleted is left."""
        now = time.monotonic()
        if now - self._tidied_at >= PRUNE_S:
            self._tidied_at = now
            try:
                prune(self._kit)
            except OSError as error:
                logger.warning("old jobs of %s cannot be deleted: %s", self._kit, error)


def keep_running(kit: Path, tell: Callable[[str], None], metrics_port: int | None = None) -> None:
    """Run a kit until Ctrl-C or SIGTERM; with a port, serve the metrics of its runs there.

    Raises DeployError if it cannot or may not run.
    """
    service = Service(kit)
    if processes_of(service.kit):
        raise DeployError(f"{kit} is running already")
    reporter, housekeeper = Reporter(service, tell), Housekeeper(service.kit)
    with interrupt_on_sigterm(), contextlib.ExitStack() as at_end:
        if metrics_port is not None:
            if service.kind != "server":
                raise DeployError(f"{kit} is the kit of a site; only the server has metrics of a run")
            server = MetricsServer(service.kit / STATUS_FOLDER, metrics_port)
            at_end.callback(server.close)
            tell(f"metrics: http://{HOST}:{server.port}/metrics")
        service.start()
        try:
            while True:
                reporter.report()
                housekeeper.tidy()
                service.restart_if_dead()
                time.sleep(1.0)
        finally:
            service.stop()
