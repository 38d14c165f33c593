"""Control a running federation with an admin's kit: list sites, submit, follow and abort jobs, read logs.

A session of FLARE's admin API ends with the server; after an absence of the server a new one is opened.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from nvflare.fuel.flare_api.api_spec import JobNotRunning, NoReply
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session

from splitft.errors import DeployError

CONNECT_S = 15.0
"""Longest time to connect to the server."""
T = TypeVar("T")


class Console:
    """An admin's connection to a federation. Every method raises DeployError if the server is away."""

    def __init__(self, kit: Path) -> None:
        """Read the admin's name. Raises DeployError if this is no admin's kit."""
        path = kit / "startup" / "fed_admin.json"
        try:
            self._user = str(json.loads(path.read_text(encoding="utf-8"))["admin"]["username"])
        except (OSError, ValueError, LookupError) as error:
            raise DeployError(f"{kit} is no admin's startup kit: {path} cannot be read") from error
        self._kit = kit.resolve()
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
        return {client.name for client in self._do(lambda session: session.get_connected_client_list())}

    def submit(self, job: Path) -> str:
        """Submit a job folder; returns the job's id."""
        return str(self._do(lambda session: session.submit_job(str(job))))

    def state(self, job: str) -> str:
        """Return FLARE's state of a job: SUBMITTED, RUNNING, FINISHED:COMPLETED and others."""
        return str(self._do(lambda session: session.get_job_status(job)))

    def ask(self, job: str, topic: str) -> dict[str, Any] | None:
        """Return a running job's answer to a command; None if it does not run, or not yet."""

        def command(session: Session) -> dict[str, Any] | None:
            try:
                answer = session.do_app_command(job, topic, {})
            except (NoReply, JobNotRunning):
                return None
            return answer if isinstance(answer, dict) else None

        return self._do(command)

    def jobs(self) -> list[dict[str, Any]]:
        """Return all jobs, the newest first."""
        return list(self._do(lambda session: session.list_jobs(reverse=True)))

    def abort(self, job: str) -> None:
        """Abort a job."""
        self._do(lambda session: session.abort_job(job))

    def logs(self, job: str, party: str) -> dict[str, str]:
        """Return the log of a party (`server`, a site, or `all`) for a job, or why it is not available."""
        found = self._do(lambda session: session.get_job_logs(job, target=party))
        missing = {name: f"({reason})" for name, reason in found.get("unavailable", {}).items()}
        return {str(name): str(text) for name, text in {**missing, **found.get("logs", {})}.items()}

    def fetch(self, job: str, into: Path) -> bool:
        """Copy the run folder of a job's result over `into`; returns False if the result has none."""
        with tempfile.TemporaryDirectory() as scratch:
            result = Path(self._do(lambda session: session.download_job_result(job, scratch)))
            found = next(result.rglob("run/config.yaml"), None)
            if found is None:
                return False
            shutil.copytree(found.parent, into, dirs_exist_ok=True)
        return True

    # ----------------------------------------------------------------------------------------------

    def _do(self, call: Callable[[Session], T]) -> T:
        """Call FLARE's admin API, in a new session if need be. Raises DeployError if that fails."""
        try:
            with _silent():
                if self._session is None:
                    self._session = new_secure_session(self._user, str(self._kit), timeout=CONNECT_S)
                return call(self._session)
        except Exception as error:  # FLARE raises bare exceptions too when its server is away
            self.close()
            text = str(error) or type(error).__name__
            raise DeployError(f"the federation's server does not answer: {text}") from error


@contextlib.contextmanager
def _silent() -> Any:
    """Suppress what FLARE prints to the terminal."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
