"""Control a running federation with an admin's kit: list sites, submit, follow and abort jobs, read logs.

A session of FLARE's admin API ends with the server; after an absence of the server a new one is opened. Texts
of the server are made printable here; lines of a log where they are printed.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from nvflare.fuel.flare_api.api_spec import (
    AuthorizationError,
    InternalError,
    InvalidJobDefinition,
    JobNotDone,
    JobNotFound,
    JobNotRunning,
    NoReply,
)
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session

from splitft.errors import AwayError, DeployError
from splitft.foreign_text import printable, printable_data

CONNECT_S = 15.0
"""Longest time to connect to the server."""
T = TypeVar("T")
_ANSWERS = (InvalidJobDefinition, JobNotDone, JobNotFound, JobNotRunning)
"""Errors of FLARE that its server has answered with; it raises InternalError without an answer too."""
UNKNOWN = "FINISHED:UNKNOWN"
"""State of a job that the server does not know, such as after its storage was lost."""


class NotRunningError(DeployError):
    """A job that should answer has no process."""


class Console:
    """An admin's connection to a federation.

    Every method raises AwayError if the server is away, and DeployError if it refuses.
    """

    def __init__(self, kit: Path) -> None:
        """Read the admin's name. Raises DeployError if this is no admin's kit."""
        path = kit / "startup" / "fed_admin.json"
        try:
            self._user = str(json.loads(path.read_text(encoding="utf-8"))["admin"]["username"])
        except (OSError, ValueError, LookupError) as error:
            raise DeployError(f"{kit} is no admin's startup kit: {path} cannot be read") from error
        self.kit = kit.resolve()
        self._session: Session | None = None

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        if self._session is not None:
            with contextlib.suppress(Exception), _silent():
                self._session.close()
            self._session = None

    def connected(self) -> set[str]:
        """Return the sites that are connected now."""
        clients = self._do(lambda session: session.get_connected_client_list())
        return {printable(str(client.name)) for client in clients}

    def submit(self, job: Path) -> str:
        """Submit a job folder; returns the job's id."""
        return str(self._do(lambda session: session.submit_job(str(job))))

    def state(self, job: str) -> str:
        """Return FLARE's state of a job: SUBMITTED, RUNNING, FINISHED:COMPLETED and others."""

        def state(session: Session) -> str:
            try:
                return str(session.get_job_status(job))
            except JobNotFound:
                return UNKNOWN

        return printable(self._do(state))

    def ask(self, job: str, topic: str) -> dict[str, Any] | None:
        """Return a running job's answer to a command; None if none comes.

        Raises NotRunningError if the job has no process: not yet, no more, or since the server has crashed.
        """

        def command(session: Session) -> dict[str, Any] | None:
            try:
                answer = session.do_app_command(job, topic, {})
            except (NoReply, InternalError):  # such as from a job that has not got so far
                return None
            return printable_data(answer) if isinstance(answer, dict) else None

        return self._do(command)

    def refusals(self, job: str) -> dict[str, str]:
        """Return the parties that did not take a job, and why; their sites' own rules may forbid it."""
        detail = self._do(lambda session: session.get_job_meta(job)).get("job_deploy_detail") or []
        found = dict(line.split(": ", 1) for line in map(str, detail) if ": " in line)
        return {printable(name): printable(text) for name, text in found.items() if text != "OK"}

    def jobs(self) -> list[dict[str, Any]]:
        """Return all jobs, the newest first."""
        return [printable_data(job) for job in self._do(lambda session: session.list_jobs(reverse=True))]

    def abort(self, job: str) -> None:
        """Abort a job."""
        self._do(lambda session: session.abort_job(job))

    def logs(self, job: str, party: str) -> dict[str, str]:
        """Return the log of a party (`server`, a site, or `all`) for a job, or why it is not available."""
        found = self._do(lambda session: session.get_job_logs(job, target=party))
        missing = {name: f"({reason})" for name, reason in found.get("unavailable", {}).items()}
        return {str(name): str(text) for name, text in {**missing, **found.get("logs", {})}.items()}

    def result(self, job: str, into: Path) -> Path | None:
        """Download a job's result below a folder; returns where it lies, None if the job left none."""

        def download(session: Session) -> Path | None:
            try:
                return Path(session.download_job_result(job, str(into)))
            except (InternalError, JobNotDone, JobNotFound, TypeError, RuntimeError):
                return None

        return self._do(download)

    # ----------------------------------------------------------------------------------------------

    def _do(self, call: Callable[[Session], T]) -> T:
        """Call FLARE's admin API, in a new session if need be. Raises DeployError if that fails."""
        try:
            with _silent():
                if self._session is None:
                    self._session = new_secure_session(self._user, str(self.kit), timeout=CONNECT_S)
                return call(self._session)
        except JobNotRunning as error:
            raise NotRunningError(f"the federation's server answers: {printable(str(error))}") from error
        except AuthorizationError as error:
            raise DeployError(
                f"{self._user} may not do this: {printable(str(error))}. Runs are submitted, watched and "
                "stopped with the submitter's kit; an administrator's kit watches, stops and shuts out"
            ) from error
        except _ANSWERS as error:
            raise DeployError(f"the federation's server answers: {printable(str(error))}") from error
        except Exception as error:  # FLARE raises bare exceptions too when its server is away
            self.close()
            text = printable(str(error) or type(error).__name__)
            raise AwayError(f"the federation's server does not answer: {text}") from error


@contextlib.contextmanager
def _silent() -> Any:
    """Suppress what FLARE prints to the terminal."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
