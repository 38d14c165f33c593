"""One link of a run as a FLARE job: the controller is our server, the executor our client.

    job folder   meta.json                     who takes part: whoever is connected
                 app/config/config_fed_*.json  run, link, configuration; nothing else, and no code

The code is the installed package on each machine; sites allow its classes by name (`kits`), so a job cannot
bring its own. The run's folder lies under the server's `runs/` and outlives the jobs.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import yaml
from nvflare.apis.controller_spec import Task
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from splitft.config import RunConfig, dump, from_mapping
from splitft.deploy.common import common_of, open_site
from splitft.deploy.flare.times import GIVE_UP_S, STOP_S
from splitft.deploy.flare.transport import FlareAnswers, FlareCarrier
from splitft.deploy.server.session import ServerSession
from splitft.deploy.site.optimizer_store import OptimizerStore
from splitft.deploy.site.policy import NAME, at_site, load_site
from splitft.deploy.site.session import SiteSession, decline
from splitft.errors import ForbiddenError, SplitftError

TASK = "splitft"
STATUS, MAKE_ROOM, STOP = "splitft.status", "splitft.make_room", "splitft.stop"
"""Commands that a running job answers."""
RUNS = "SPLITFT_RUNS"
"""Environment variable of the server: where runs are kept, in place of `runs/` in its kit."""
COLLECTED = ("config.yaml", "events.jsonl", "summary.json", "report.html", "adapter")
"""What of a run folder goes into a job's result."""

logger = logging.getLogger(__name__)


class ServerJob(Controller):
    """The server's side."""

    def __init__(self, run: str, link: str, config: str) -> None:
        """FLARE makes it from the job's configuration."""
        super().__init__()
        self._run, self._secret = run, bytes.fromhex(link)
        self._config = read_config(config)
        self._link: ServerSession | None = None

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Be there for messages and commands."""
        engine = fl_ctx.get_engine()
        self._answers = FlareAnswers(fl_ctx)
        engine.register_app_command(STATUS, self._status)
        engine.register_app_command(MAKE_ROOM, self._make_room)
        engine.register_app_command(STOP, self._stop)

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """One link, from the last finished round on."""
        engine = fl_ctx.get_engine()
        present = tuple(client.name for client in engine.get_clients())
        task = Task(name=TASK, data=Shareable())
        self.broadcast(task=task, fl_ctx=fl_ctx, targets=list(present), min_responses=len(present))
        folder = runs_of(engine.get_workspace().get_root_dir()) / self._run
        try:
            self._link = ServerSession(common_of(self._config), folder, present, self._secret)
            self._answers.open(self._link.desk.answer)
            done = threading.Event()
            threading.Thread(target=self._watch, args=(abort_signal, done), daemon=True).start()
            try:
                ended = self._link.serve()
            finally:
                done.set()
            logger.info("link of %s ended: %s", self._run, ended.reason)
        except SplitftError as error:
            self.system_panic(f"splitft: {error}", fl_ctx)
        finally:
            self._collect(folder, Path(engine.get_workspace().get_run_dir(fl_ctx.get_job_id())))
        until = time.monotonic() + STOP_S
        while time.monotonic() < until and not abort_signal.triggered and self.get_num_standing_tasks():
            time.sleep(0.2)
        self.cancel_all_tasks(fl_ctx=fl_ctx)

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Nothing is left to stop."""

    def process_result_of_unknown_task(self, *args: Any, **kwargs: Any) -> None:
        """A site reports after the link has ended: nothing to do."""

    def _watch(self, abort_signal: Signal, done: threading.Event) -> None:
        """Let everybody go when the job is stopped from outside."""
        while not done.wait(0.5):
            if abort_signal.triggered and self._link is not None:
                self._link.abort()
                return

    def _status(self, topic: str, data: Any, fl_ctx: FLContext, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {"run": self._run, **(self._link.status() if self._link else {})}

    def _make_room(
        self, topic: str, data: Any, fl_ctx: FLContext, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        if self._link is not None:
            self._link.make_room()
        return {"run": self._run}

    def _stop(self, topic: str, data: Any, fl_ctx: FLContext, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self._link is not None:
            self._link.stop()
        return {"run": self._run, "stopped": self._link is not None}

    def _collect(self, folder: Path, result: Path) -> None:
        """Put what the run has so far into the job's result, for whoever submitted it."""
        for name in COLLECTED:
            source, target = folder / name, result / "run" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            elif source.is_file():
                shutil.copy(source, target)


class SiteJob(Executor):
    """A site's side."""

    def __init__(self, run: str, link: str, config: str) -> None:
        """FLARE makes it from the job's configuration."""
        super().__init__()
        self._run, self._secret, self._config = run, bytes.fromhex(link), read_config(config)

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Take part until the link ends."""
        name, workspace = fl_ctx.get_identity_name(), fl_ctx.get_engine().get_workspace()
        carrier = FlareCarrier(fl_ctx, abort_signal)
        try:
            file = Path(workspace.get_root_dir()) / "local" / NAME
            site = load_site(file) if file.is_file() else None
            try:
                party = open_site(self._config, name, site)
            except ForbiddenError as error:
                common = common_of(self._config if site is None else at_site(self._config, site))
                decline(name, str(error), carrier, self._secret, common.terms, common.frame_limit, GIVE_UP_S)
                return make_reply(ReturnCode.OK)
            visit = SiteSession(
                party.hello,
                carrier,
                self._secret,
                party.common.terms,
                party.common.frame_limit,
                party.open_client,
                OptimizerStore(runs_of(workspace.get_root_dir()) / self._run / name),
                patience_s=GIVE_UP_S,
                alive_every_s=self._config.deploy.silence_s / 4,
                seed=self._config.seed,
                guard=party.guard,
                in_flight=min(self._config.training.in_flight, self._config.training.micro_batches),
            )
            logger.info("%s leaves: %s", name, visit.run())
        except SplitftError as error:
            logger.error("%s leaves: %s", name, error)
            return make_reply(ReturnCode.EXECUTION_EXCEPTION)
        return make_reply(ReturnCode.OK)


def runs_of(workspace: str) -> Path:
    """Where a party of a federation keeps its runs."""
    return Path(os.environ.get(RUNS) or Path(workspace) / "runs")


def read_config(text: str) -> RunConfig:
    """The run's configuration from a job."""
    return from_mapping(yaml.safe_load(text))


def write_job(folder: Path, run: str, config: RunConfig, min_clients: int = 1) -> Path:
    """Write one link of a run as a job folder, with a secret of its own."""
    arguments = {"run": run, "link": secrets.token_hex(16), "config": dump(config)}
    meta = {
        "name": run,
        "resource_spec": {},
        "deploy_map": {"app": ["@ALL"]},
        "min_clients": min_clients,
    }
    server = {"id": "splitft", "path": f"{__name__}.{ServerJob.__name__}", "args": arguments}
    executor = {"path": f"{__name__}.{SiteJob.__name__}", "args": arguments}
    files = {
        "meta.json": meta,
        "app/config/config_fed_server.json": {"format_version": 2, "workflows": [server], "components": []},
        "app/config/config_fed_client.json": {
            "format_version": 2,
            "executors": [{"tasks": [TASK], "executor": executor}],
            "components": [],
        },
    }
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2), encoding="utf-8")
    return folder
