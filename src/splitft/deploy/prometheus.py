"""Serve the status of a federation's runs as Prometheus metrics, on this machine only.

    job of a session --write_status, every STATUS_S--> KIT/status/RUN.json --scrape--> http://127.0.0.1:N/metrics

The endpoint is a thread of `splitft deploy start` and not of the job, so that it also answers between two
sessions and after a crash, when watching matters most. FLARE's own monitoring is not used: it pushes counts
of its events to a StatsD server that must be run beside it, and knows no rounds, losses or last messages.

Text format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from splitft.deploy.alerts import alerts
from splitft.errors import DeployError
from splitft.files import write_whole

STATUS_FOLDER = "status"
"""Folder in the server's kit with the statuses of its runs."""
HOST = "127.0.0.1"
"""Only this machine reaches the metrics: they tell sites' names and losses."""
STATUS_S = 2.0
"""Seconds between two writes of a session's status."""
RUNS_KEPT = 20
"""Statuses of earlier runs that stay; older ones are deleted."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STATES = ("training", "away", "lost", "late", "refused", "declined")
"""States of a site; each is counted, also when it is 0."""

logger = logging.getLogger(__name__)
Labels = Mapping[str, str]
Status = Mapping[str, Any]


@dataclass
class _Metric:
    """One metric and its samples."""

    name: str
    kind: str
    help: str
    samples: list[tuple[Labels, float]] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """Yield the lines of the text format."""
        yield f"# HELP {self.name} {self.help}"
        yield f"# TYPE {self.name} {self.kind}"
        for labels, value in self.samples:
            inside = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
            yield f"{self.name}{{{inside}}} {_number(value)}" if inside else f"{self.name} {_number(value)}"


METRICS = {
    "up": ("gauge", "1 while the server's process is kept running."),
    "session_running": ("gauge", "1 while a session of the run trains."),
    "status_age_seconds": ("gauge", "Seconds since the run wrote its status."),
    "rounds": ("gauge", "Rounds to train."),
    "rounds_done": ("gauge", "Rounds that are trained and saved."),
    "held_out_loss": ("gauge", "Mean held-out loss of all sites after the last round, in nats per token."),
    "held_out_accuracy": ("gauge", "Share of the held-out tokens of all sites that are predicted right."),
    "steps_total": ("counter", "Optimizer steps of all sites."),
    "tokens_total": ("counter", "Labelled tokens trained on."),
    "step_seconds_total": ("counter", "Wall seconds of steps by leg."),
    "bytes_total": ("counter", "Bytes on the wire by purpose, role and direction."),
    "sites": ("gauge", "Sites by state."),
    "site_heard_seconds": ("gauge", "Seconds since the last message of a site."),
    "site_held_out_loss": ("gauge", "Held-out loss of a site."),
    "site_troubles_total": (
        "counter",
        "Times that a site was refused, declined, lost, late, bounded or doubted.",
    ),
    "refusals_total": ("counter", "Invalid messages of all sites that the server refused."),
    "rounds_undone_total": ("counter", "Rounds in which most sites failed, and which were undone."),
    "disk_free_bytes": ("gauge", "Free bytes of the disk with the run folder."),
    "alerts": ("gauge", "Number of alerts that `splitft deploy status` shows."),
}
"""Kind and meaning of every metric, by its name without `splitft_`."""


def status_file(kit: Path, run: str) -> Path:
    """Return the file in the server's kit with the status of a run."""
    return kit / STATUS_FOLDER / f"{run}.json"


def write_status(path: Path, status: Status, *, running: bool) -> None:
    """Write the status of a run for the endpoint."""
    write_whole(path, json.dumps({**status, "running": running, "t": time.time()}))


@contextlib.contextmanager
def status_written(path: Path, status: Callable[[], Status]) -> Iterator[None]:
    """Write the status of a session at intervals from a thread, and once more when it has ended.

    A status that cannot be written is logged: a run does not depend on who watches it.
    """
    done = threading.Event()

    def write(running: bool) -> None:
        try:
            write_status(path, status(), running=running)
        except Exception as error:  # whatever it is, it must not end the run
            logger.warning("the status for metrics cannot be written to %s: %s", path, error)

    def keep_writing() -> None:
        while not done.wait(STATUS_S):
            write(running=True)

    write(running=True)
    thread = threading.Thread(target=keep_writing, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(STATUS_S)
        write(running=False)


def read_statuses(folder: Path) -> dict[str, Status]:
    """Return the statuses of the last runs by the runs' names; a file that cannot be read is left out."""
    found: dict[str, Status] = {}
    files = sorted(folder.glob("*.json"), key=_modified, reverse=True)
    for path in files[:RUNS_KEPT]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            status = json.loads(path.read_text(encoding="utf-8"))
            float(status["t"])
            found[path.stem] = status
    for path in files[RUNS_KEPT:]:
        path.unlink(missing_ok=True)
    return found


def to_prometheus(statuses: Mapping[str, Status], now: float) -> str:
    """Return the metrics of all runs in the text format."""
    metrics = {name: _Metric(f"splitft_{name}", kind, text) for name, (kind, text) in METRICS.items()}
    metrics["up"].samples.append(({}, 1))
    for run, status in statuses.items():
        for name, labels, value in _samples(status, now):
            if value is not None:
                metrics[name].samples.append(({"run": run, **labels}, value))
    return "".join(f"{line}\n" for metric in metrics.values() if metric.samples for line in metric.lines())


def _samples(status: Status, now: float) -> Iterable[tuple[str, Labels, float | None]]:
    """Yield metric, labels and value of one run; None where it is not known."""
    sites, troubles = status.get("sites", ()), status.get("troubles", ())
    age = max(0.0, now - float(status["t"]))
    yield "session_running", {}, float(bool(status.get("running")))
    yield "status_age_seconds", {}, age
    for name in ("rounds", "rounds_done", "disk_free_bytes"):
        yield name, {}, status.get(name)
    yield "held_out_loss", {}, status.get("eval_loss")
    yield "held_out_accuracy", {}, status.get("eval_accuracy")
    yield "steps_total", {}, status.get("steps")
    yield "tokens_total", {}, status.get("tokens")
    for leg, seconds in status.get("seconds", {}).items():
        yield "step_seconds_total", {"leg": leg}, seconds
    for one in status.get("bytes", ()):
        labels = {key: one[key] for key in ("purpose", "role", "direction")}
        yield "bytes_total", labels, one["bytes"]
    counts = Counter(site["state"] for site in sites)
    for state in dict.fromkeys((*STATES, *counts)):
        yield "sites", {"state": state}, counts[state]
    for site in sites:
        heard = site.get("heard_s_ago")
        yield "site_heard_seconds", {"site": site["name"]}, None if heard is None else heard + age
        yield "site_held_out_loss", {"site": site["name"]}, site.get("held_out")
    for trouble in troubles:
        labels = {"site": trouble["site"], "state": trouble["state"]}
        yield "site_troubles_total", labels, trouble["times"]
    yield "rounds_undone_total", {}, float(len(status.get("undone", ())))
    yield "refusals_total", {}, sum(one["times"] for one in troubles if one["state"] == "refused")
    yield "alerts", {}, len(alerts(status)) if status.get("running") else 0


class MetricsServer:
    """Answers `GET /metrics` on this machine from the statuses in a folder."""

    def __init__(self, folder: Path, port: int) -> None:
        """Listen on the port, or on a free one with 0. Raises DeployError if it is taken."""
        try:
            self._server = ThreadingHTTPServer((HOST, port), _handler(folder))
        except OSError as error:
            raise DeployError(
                f"metrics cannot be served on {HOST}:{port} ({error.strerror}); give another --metrics-port"
            ) from error
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


def _handler(folder: Path) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Answers one request."""

        timeout = 10.0
        server_version, sys_version = "splitft", ""

        def do_GET(self) -> None:
            """Answer with the metrics, or say where they are."""
            if self.path.partition("?")[0] != "/metrics":
                self._answer(HTTPStatus.NOT_FOUND, "metrics are at /metrics\n")
                return
            self._answer(HTTPStatus.OK, to_prometheus(read_statuses(folder), time.time()))

        def _answer(self, status: HTTPStatus, text: str) -> None:
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing: a scrape is no news."""

    return Handler


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("+Inf" if value > 0 else "-Inf")
    return repr(value)
