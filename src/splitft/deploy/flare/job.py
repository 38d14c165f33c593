"""Run one session as a FLARE job: the controller is our server, the executor our client.

    job folder   meta.json                     who takes part: every connected site
                 app/config/config_fed_*.json  run, session key ("link"), configuration; no code

The code is the installed package on each machine. Sites allow its classes by name (`provisioning`), so a job
cannot bring its own. The run folder lies under the server's `runs/` and outlives the jobs.
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
from splitft.deploy.flare.processes import STOP_S
from splitft.deploy.flare.transport import FlareAnswers, FlareTransport
from splitft.deploy.run_terms import RunTerms, load_run_terms
from splitft.deploy.server.session import ServerSession
from splitft.deploy.site.optimizer_store import OptimizerStore
from splitft.deploy.site.policy import SITE_FILE, at_site, load_site
from splitft.deploy.site.session import Connection, SiteSession, decline
from splitft.deploy.site.setup import open_site
from splitft.errors import ForbiddenError, PluginError, SplitftError

TASK = "splitft"
STATUS, MAKE_ROOM, STOP = "splitft.status", "splitft.make_room", "splitft.stop"
"""Commands that a running job answers."""
RUNS = "SPLITFT_RUNS"
"""Environment variable of the server: folder for runs, in place of `runs/` in its kit."""
COLLECTED = ("config.yaml", "events.jsonl", "summary.json", "report.html", "adapter")
"""Parts of a run folder that go into a job's result."""
GIVE_UP_S = 900.0
"""A site leaves the job after the server has not answered for this long; it returns with the next session."""

logger = logging.getLogger(__name__)


class ServerJob(Controller):
    """The server's side."""

    def __init__(self, run: str, link: str, config: str) -> None:
        """Called by FLARE with the arguments in the job folder; `link` is the session key in hexadecimal."""
        super().__init__()
        self._run, self._session_key, self._text = run, bytes.fromhex(link), config
        self._session: ServerSession | None = None

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Register for messages and commands."""
        engine = fl_ctx.get_engine()
        self._answers = FlareAnswers(fl_ctx)
        engine.register_app_command(STATUS, self._status)
        engine.register_app_command(MAKE_ROOM, self._make_room)
        engine.register_app_command(STOP, self._stop)

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Run one session, from the last finished round on."""
        # start the sites' side
        engine = fl_ctx.get_engine()
        connected = tuple(client.name for client in engine.get_clients())
        task = Task(name=TASK, data=Shareable())
        self.broadcast(task=task, fl_ctx=fl_ctx, targets=list(connected), min_responses=len(connected))
        # train
        folder = runs_of(engine.get_workspace().get_root_dir()) / self._run
        try:
            config = read_config(self._text, owner_folder(engine.get_workspace().get_root_dir()))
            self._session = ServerSession(load_run_terms(config), folder, connected, self._session_key)
            self._answers.open(self._session.inbox.answer)
            done = threading.Event()
            threading.Thread(target=self._watch, args=(abort_signal, done), daemon=True).start()
            try:
                ended = self._session.serve()
            finally:
                done.set()
            logger.info("session of %s ended: %s", self._run, ended.reason)
        except SplitftError as error:
            self.system_panic(f"splitft: {error}", fl_ctx)
        finally:
            self._collect(folder, Path(engine.get_workspace().get_run_dir(fl_ctx.get_job_id())))
        # let the sites leave by themselves
        deadline = time.monotonic() + STOP_S
        while time.monotonic() < deadline and not abort_signal.triggered and self.get_num_standing_tasks():
            time.sleep(0.2)
        self.cancel_all_tasks(fl_ctx=fl_ctx)

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Do nothing: `control_flow` stops by itself."""

    def process_result_of_unknown_task(self, *args: Any, **kwargs: Any) -> None:
        """Ignore a site that reports after the session has ended."""

    def _watch(self, abort_signal: Signal, done: threading.Event) -> None:
        """End the session when the job is stopped from outside."""
        while not done.wait(0.5):
            if abort_signal.triggered and self._session is not None:
                self._session.abort()
                return

    def _status(self, topic: str, data: Any, fl_ctx: FLContext, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {"run": self._run, **(self._session.status() if self._session else {})}

    def _make_room(
        self, topic: str, data: Any, fl_ctx: FLContext, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        if self._session is not None:
            self._session.make_room()
        return {"run": self._run}

    def _stop(self, topic: str, data: Any, fl_ctx: FLContext, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self._session is not None:
            self._session.stop()
        return {"run": self._run, "stopped": self._session is not None}

    def _collect(self, folder: Path, result: Path) -> None:
        """Copy what the run has so far into the job's result, for whoever submitted it."""
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
        """Called by FLARE with the arguments in the job folder; `link` is the session key in hexadecimal."""
        super().__init__()
        self._run, self._session_key, self._text = run, bytes.fromhex(link), config

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Take part until the session ends."""
        name, workspace = fl_ctx.get_identity_name(), fl_ctx.get_engine().get_workspace()
        transport = FlareTransport(fl_ctx, abort_signal)
        try:
            owner = owner_folder(workspace.get_root_dir())
            site = load_site(owner / SITE_FILE) if (owner / SITE_FILE).is_file() else None
            config = without_choices(self._text)  # enough to decline
            try:
                config = read_config(self._text, owner)
                party = open_site(config, name, site)
            except (ForbiddenError, PluginError) as error:
                terms = load_run_terms(config if site is None else at_site(config, site))
                decline(name, str(error), self._connection(transport, terms, config))
                return make_reply(ReturnCode.OK)
            store = OptimizerStore(runs_of(workspace.get_root_dir()) / self._run / name)
            connection = self._connection(transport, party.terms, config)
            session = SiteSession(party.register, connection, party.open_client, store, party.policy)
            logger.info("%s leaves: %s", name, session.run())
        except SplitftError as error:
            logger.error("%s leaves: %s", name, error)
            return make_reply(ReturnCode.EXECUTION_EXCEPTION)
        return make_reply(ReturnCode.OK)

    def _connection(self, transport: FlareTransport, terms: RunTerms, config: RunConfig) -> Connection:
        return Connection(
            transport,
            self._session_key,
            terms.serializer,
            terms.frame_limit,
            patience_s=GIVE_UP_S,
            heartbeat_s=config.deploy.silence_s / 4,
            in_flight=min(config.training.in_flight, config.training.micro_batches),
            seed=config.seed,
        )


def runs_of(workspace: str) -> Path:
    """Return the folder in which a party of a federation keeps its runs."""
    return Path(os.environ.get(RUNS) or Path(workspace) / "runs")


def owner_folder(workspace: str) -> Path:
    """Return the folder of a kit that belongs to its owner: policy, and approved plug-ins."""
    return Path(workspace) / "local"


def read_config(text: str, owner: Path) -> RunConfig:
    """Read the run's configuration from a job, with plug-ins that the owner of this machine approved.

    Raises PluginError if the run asks for others.
    """
    return from_mapping(yaml.safe_load(text), owner=owner)


def without_choices(text: str) -> RunConfig:
    """Read only those parts of a job's configuration that name nothing of a plug-in."""
    sections = yaml.safe_load(text)
    return from_mapping({key: sections[key] for key in ("model", "split", "training", "deploy", "seed")})


def write_job(folder: Path, run: str, config: RunConfig) -> Path:
    """Write one session of a run as a job folder, with a session key of its own."""
    plugins = tuple(one.model_copy(update={"file": Path(one.file).name}) for one in config.plugins)
    sent = config.model_copy(update={"plugins": plugins})
    arguments = {"run": run, "link": secrets.token_hex(16), "config": dump(sent)}
    meta = {"name": run, "resource_spec": {}, "deploy_map": {"app": ["@ALL"]}, "min_clients": 1}
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
