"""A FLARE job that echoes bytes with the transport of a run, for `deployment.py` and `throughput.py`.

    site: n channels, one message after the other on each --transport, requests--> server: returns the bytes

Transport, request ids and worker threads are those of a run; only the model is missing.
"""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nvflare.apis.controller_spec import Task
from nvflare.apis.executor import Executor
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from splitft.deploy.flare.transport import FlareAnswers, FlareTransport
from splitft.deploy.requests import Envelope, ReplyCache, RequestChannel
from splitft.deploy.server.inbox import HOLD_S

SESSION, LIMIT, WITHIN_S, TASK = bytes(16), 2**26, 120.0, "echo"
LANES = 4
"""Request channels of a site."""
TOGETHER_S = 5.0
"""Delay after which several sites start at the same time."""


class Echo:
    """The server: checks request ids and answers repeats as in a run, and returns the same bytes."""

    def __init__(self, sites: list[str]) -> None:
        self._repeats = {site: ReplyCache() for site in sites}
        self._workers = ThreadPoolExecutor(len(sites) * LANES)

    def answer(self, site: str, data: bytes) -> bytes:
        """Answer a request, as `requests.Answer`."""
        envelope = Envelope.from_bytes(data, SESSION, LIMIT)
        return self._repeats[site].answer(envelope, lambda frame: frame, self._workers, HOLD_S)


class Asking:
    """The request channels of a site."""

    def __init__(self, transport: Any, lanes: int = LANES) -> None:
        self._lanes = [RequestChannel(transport, SESSION, number, LIMIT) for number in range(lanes)]

    def ask(self, size: int, repeats: int, lanes: int, at: float = 0.0) -> dict[str, Any]:
        """Send messages after a warm-up; return the seconds of each, and the times of start and end."""
        frame, seconds = bytes(size), list[float]()

        def one_lane(lane: RequestChannel) -> None:
            for _ in range(repeats // lanes):
                began = time.perf_counter()
                lane.ask(frame, WITHIN_S)
                seconds.append(time.perf_counter() - began)

        self._lanes[0].ask(frame, WITHIN_S)
        threads = [threading.Thread(target=one_lane, args=(lane,)) for lane in self._lanes[:lanes]]
        time.sleep(max(0.0, at - time.time()))  # FLARE hands tasks out at different moments
        began = time.time()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"seconds": seconds, "began": began, "ended": time.time()}


class EchoServer(Controller):
    """Runs the stages one after the other and writes the sites' measurements to a file."""

    def __init__(self, stages: list[dict[str, Any]], out: str) -> None:
        super().__init__()
        self._stages, self._out = stages, Path(out)

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Register for messages."""
        self._answers = FlareAnswers(fl_ctx)

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Run all stages."""
        self._answers.open(Echo([client.name for client in fl_ctx.get_engine().get_clients()]).answer)
        results = []
        for stage in self._stages:
            found: dict[str, Any] = {}

            def take(client_task: Any, fl_ctx: FLContext, found: dict[str, Any] = found) -> None:
                found[client_task.client.name] = json.loads(client_task.result["measured"])

            targets = stage["sites"]
            at = time.time() + (TOGETHER_S if len(targets) > 1 else 0.0)
            data = Shareable({"stage": json.dumps({**stage, "at": at})})
            task = Task(name=TASK, data=data, result_received_cb=take)
            self.broadcast_and_wait(
                task=task, fl_ctx=fl_ctx, targets=targets, min_responses=len(targets),
                abort_signal=abort_signal,
            )  # fmt: skip
            results.append({**stage, "measured": found})
            if abort_signal.triggered:
                return
        scratch = self._out.with_suffix(".part")
        scratch.write_text(json.dumps(results), encoding="utf-8")
        scratch.rename(self._out)

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Do nothing: there is nothing to stop."""

    def process_result_of_unknown_task(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: there are no unknown tasks."""


class EchoSite(Executor):
    """Sends the messages of a stage."""

    def __init__(self) -> None:
        super().__init__()
        self._asking: Asking | None = None

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Run one stage."""
        stage = json.loads(shareable["stage"])
        if self._asking is None:
            self._asking = Asking(FlareTransport(fl_ctx, abort_signal))
        measured = self._asking.ask(stage["size"], stage["repeats"], stage["lanes"], stage["at"])
        return Shareable({"measured": json.dumps(measured)})


def write_echo_job(folder: Path, stages: list[dict[str, Any]], out: Path) -> Path:
    """Write the job's folder for FLARE."""
    server = {"id": "echo", "path": f"{__name__}.EchoServer", "args": {"stages": stages, "out": str(out)}}
    site = {"tasks": [TASK], "executor": {"path": f"{__name__}.EchoSite", "args": {}}}
    files = {
        "meta.json": {
            "name": TASK, "resource_spec": {}, "deploy_map": {"app": ["@ALL"]}, "min_clients": 1,
        },
        "app/config/config_fed_server.json": {"format_version": 2, "workflows": [server], "components": []},
        "app/config/config_fed_client.json": {"format_version": 2, "executors": [site], "components": []},
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder
