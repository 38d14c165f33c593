"""Talk to a running federation with an admin's kit: who is there, submit, follow, stop.

A session lasts as long as the server does; after the server was away it is opened anew.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from nvflare.fuel.flare_api.api_spec import JobNotRunning, NoReply
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session

from splitft.errors import DeployError

CONNECT_S = 15.0
T = TypeVar("T")


class Console:
    """An admin's line to a federation."""

    def __init__(self, kit: Path) -> None:
        """Raises DeployError if this is no admin's kit."""
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
        """Hang up."""
        if self._session is not None:
            with contextlib.suppress(Exception), _silent():
                self._session.close()
            self._session = None

    def connected(self) -> set[str]:
        """Sites that are connected now. Raises DeployError if the server is away."""
        return {client.name for client in self._do(lambda session: session.get_connected_client_list())}

    def submit(self, job: Path) -> str:
        """Hand in a job folder; returns the job's id."""
        return str(self._do(lambda session: session.submit_job(str(job))))

    def state(self, job: str) -> str:
        """FLARE's word for how a job is: SUBMITTED, RUNNING, FINISHED:COMPLETED and others."""
        return str(self._do(lambda session: session.get_job_status(job)))

    def ask(self, job: str, topic: str) -> dict[str, Any] | None:
        """What a running job answers to a command; None if it does not run, or not yet."""

        def command(session: Session) -> dict[str, Any] | None:
            try:
                answer = session.do_app_command(job, topic, {})
            except (NoReply, JobNotRunning):
                return None
            return answer if isinstance(answer, dict) else None

        return self._do(command)

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs, the newest first."""
        return list(self._do(lambda session: session.list_jobs(reverse=True)))

    def abort(self, job: str) -> None:
        """Stop a job."""
        self._do(lambda session: session.abort_job(job))

    def logs(self, job: str, party: str) -> dict[str, str]:
        """What a party (`server`, a site, or `all`) has logged for a job; or why that is not here."""
        found = self._do(lambda session: session.get_job_logs(job, target=party))
        missing = {name: f"({reason})" for name, reason in found.get("unavailable", {}).items()}
        return {str(name): str(text) for name, text in {**missing, **found.get("logs", {})}.items()}

    def fetch(self, job: str, into: Path) -> bool:
        """Copy the run folder out of a job's result, over what is there; False if it holds none."""
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(self._do(lambda session: session.download_job_result(job, scratch)))
            found = next(place.rglob("run/config.yaml"), None)
            if found is None:
                return False
            shutil.copytree(found.parent, into, dirs_exist_ok=True)
        return True

    # ----------------------------------------------------------------------------------------------

    def _do(self, what: Callable[[Session], T]) -> T:
        """Do it in a session, a new one if need be. Raises DeployError if it cannot be."""
        try:
            with _silent():
                if self._session is None:
                    self._session = new_secure_session(self._user, str(self._kit), timeout=CONNECT_S)
                return what(self._session)
        except Exception as error:  # FLARE raises bare exceptions, too, when its server is away
            self.close()
            text = str(error) or type(error).__name__
            raise DeployError(f"the federation's server does not answer: {text}") from error


@contextlib.contextmanager
def _silent() -> Any:
    """FLARE prints to the terminal."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def wait_for_server(console: Console, within_s: float) -> None:
    """Wait until the server answers. Raises DeployError when the time is up."""
    until = time.monotonic() + within_s
    while True:
        try:
            console.connected()
            return
        except DeployError:
            if time.monotonic() > until:
                raise
            time.sleep(1.0)
