"""Run one session as a FLARE job: the controller is our server, the executor our client.

    job folder   meta.json                     who takes part: every connected site
                 app/config/config_fed_*.json  run, session key ("link"), configuration; no code

The code is the installed package on each machine. Sites allow its classes by name (`provisioning`), so a job
cannot bring its own. The run folder lies under the server's `runs/` and outlives the jobs.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import replace
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
from nvflare.apis.workspace import Workspace

from splitft.config import RunConfig, from_mapping
from splitft.deploy.flare.job_arguments import TASK, read_arguments
from splitft.deploy.flare.processes import STOP_S
from splitft.deploy.flare.result import write_result
from splitft.deploy.flare.transport import FlareAnswers, FlareTransport
from splitft.deploy.identity.certificates import read_peers
from splitft.deploy.prometheus import status_file, status_written
from splitft.deploy.run_terms import load_run_terms
from splitft.deploy.server.run_folder import SessionRequest, UnusableError
from splitft.deploy.server.session import ServerSession
from splitft.deploy.site.connection import Connection, decline, reason_of
from splitft.deploy.site.limits import WorkLedger
from splitft.deploy.site.pause import refuse_paused
from splitft.deploy.site.policy import SITE_FILE, load_site
from splitft.deploy.site.session import SiteSession
from splitft.deploy.site.setup import SiteParty, open_site
from splitft.deploy.site.site_store import SiteStore
from splitft.deploy.supervisor import Ending
from splitft.errors import BusyError, ConfigError, SplitftError
from splitft.tracking.events import SessionEnded

STATUS, MAKE_ROOM, STOP = "splitft.status", "splitft.make_room", "splitft.stop"
"""Commands that a running job answers."""
RUNS = "SPLITFT_RUNS"
"""Environment variable of the server: folder for runs, in place of `runs/` in its kit."""
RUN_FOLDER = "SPLITFT_RUN_FOLDER"
"""Environment variable of a server of one run (`deploy poc`): the run's folder, which may have any name."""
GIVE_UP_S = 900.0
"""A site leaves the job after the server has not answered for this long; it returns with the next session."""

logger = logging.getLogger(__name__)


class ServerJob(Controller):
    """The server's side."""

    def __init__(self, **arguments: Any) -> None:
        """Take the arguments in the job folder from FLARE; they are checked when the job starts."""
        super().__init__()
        self._arguments, self._run, self._digest = arguments, "", ""
        self._folder: Path | None = None
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
        job_id = fl_ctx.get_job_id()
        try:
            ended = self._serve(engine.get_workspace(), connected, job_id, abort_signal)
            logger.info("session of %s ended: %s", self._run, ended.reason)
            ending = Ending(ended.round, ended.reason, ended.detail)
        except Exception as error:  # whoever submitted the job is told
            ending = self._failed(error)
            known = isinstance(error, SplitftError)
            logger.error("session of %s failed: %s", self._run, ending.detail, exc_info=not known)
            if ending.reason != "busy":
                self.system_panic(f"splitft: {ending.detail}", fl_ctx)
        notes = self._session.notes() if self._session else ()
        folder = self._folder if ending.reason not in ("busy", "unusable") else None
        try:
            write_result(
                Path(engine.get_workspace().get_run_dir(job_id)), folder, replace(ending, notes=notes)
            )
        except OSError as error:
            logger.error("the result of the session could not be written: %s", error)
        # let the sites leave by themselves
        deadline = time.monotonic() + STOP_S
        while time.monotonic() < deadline and not abort_signal.triggered and self.get_num_standing_tasks():
            time.sleep(0.2)
        self.cancel_all_tasks(fl_ctx=fl_ctx)

    def _serve(
        self, workspace: Workspace, connected: tuple[str, ...], session: str, abort_signal: Signal
    ) -> SessionEnded:
        """Serve the session until it ends."""
        root = workspace.get_root_dir()
        job = read_arguments(self._arguments)
        job.check_version("the server")
        self._run, self._digest, self._folder = job.run, job.digest, folder_of(root, job.run)
        terms = load_run_terms(read_config(job.config, owner_folder(root)))
        request = SessionRequest(session, job.rounds, job.restart)
        self._session = ServerSession(terms, self._folder, connected, job.session_key, request)
        self._answers.open(self._session.inbox.answer)
        done = threading.Event()
        threading.Thread(target=self._watch, args=(abort_signal, done), daemon=True).start()
        try:
            with status_written(status_file(Path(root), job.run), self._session.status):
                return self._session.serve()
        finally:
            done.set()

    def _failed(self, error: Exception) -> Ending:
        """Return how a session has ended that raised an error."""
        detail = str(error)
        if not isinstance(error, SplitftError):
            detail = f"unexpected {type(error).__name__}: {detail[:500]}; the server's log says more"
        if isinstance(error, BusyError):
            return Ending(0, "busy", detail)
        began = self._session is not None and self._session.began
        rounds = self._session.rounds_done if self._session else 0
        again = began and not isinstance(error, UnusableError)
        return Ending(
            rounds, "failed" if again or not isinstance(error, SplitftError) else "unusable", detail
        )

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
        status = self._session.status() if self._session else {}
        kit = Path(fl_ctx.get_engine().get_workspace().get_root_dir())
        return {"run": self._run, "config": self._digest, "certificates": read_peers(kit), **status}

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


class SiteJob(Executor):
    """A site's side."""

    def __init__(self, **arguments: Any) -> None:
        """Take the arguments in the job folder from FLARE; they are checked when the job starts."""
        super().__init__()
        self._arguments = arguments

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Take part until the session ends."""
        name, workspace = fl_ctx.get_identity_name(), fl_ctx.get_engine().get_workspace()
        transport, owner = FlareTransport(fl_ctx, abort_signal), owner_folder(workspace.get_root_dir())
        try:
            job = read_arguments(self._arguments)
            try:
                job.check_version("this site")
                refuse_paused(owner)
                site = load_site(owner / SITE_FILE) if (owner / SITE_FILE).is_file() else None
                config = read_config(job.config, owner)
                runs = runs_of(workspace.get_root_dir())
                party = open_site(config, name, site, WorkLedger(runs, runs / job.run / name))
            except Exception as error:  # whatever it is, the server is told and waits no longer
                if not isinstance(error, SplitftError | OSError):
                    logger.exception("%s cannot take part", name)
                decline(name, reason_of(error), transport, job.session_key, GIVE_UP_S)
                return make_reply(ReturnCode.OK)
            store = SiteStore(runs_of(workspace.get_root_dir()) / job.run / name, party.text)
            connection = _connection(transport, party, config, job.session_key)
            session = SiteSession(
                party.register,
                connection,
                party.open_client,
                store,
                party.policy,
                lambda: refuse_paused(owner),
            )
            logger.info("%s leaves: %s", name, session.run())
        except SplitftError as error:
            logger.error("%s leaves: %s", name, error)
            return make_reply(ReturnCode.EXECUTION_EXCEPTION)
        return make_reply(ReturnCode.OK)


def _connection(
    transport: FlareTransport, party: SiteParty, config: RunConfig, session_key: bytes
) -> Connection:
    return Connection(
        transport,
        session_key,
        party.terms.serializer,
        party.terms.frame_limit,
        patience_s=GIVE_UP_S,
        heartbeat_s=config.deploy.silence_s / 4,
        in_flight=min(config.training.in_flight, config.training.micro_batches),
        seed=config.seed,
        candidates=party.candidates,
    )


def folder_of(workspace: str, run: str) -> Path:
    """Return the folder of a run on the server."""
    given = os.environ.get(RUN_FOLDER)
    return Path(given) if given else runs_of(workspace) / run


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
    return from_mapping(_mapping(text), owner=owner)


def _mapping(text: str) -> dict[str, Any]:
    """Parse a job's configuration. Raises ConfigError if it is no mapping."""
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"the job's configuration is no YAML: {str(error)[:500]}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"the job's configuration is {type(found).__name__}, not a mapping; submit it anew")
    return found
