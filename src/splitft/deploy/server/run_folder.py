"""Make the server's folder of a run ready for a session, or say why it cannot be used.

FOLDER missing or empty    the run begins, unless it has finished rounds elsewhere
FOLDER/config.yaml         the run goes on from its last checkpoint
anything else              UnusableError; `submit --restart` sets it aside, and the run begins anew
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from splitft.errors import RunError
from splitft.run.lock import LOCK


class UnusableError(RunError):
    """The run folder cannot be used, by this session or by a later one, until somebody has done something."""


@dataclass(frozen=True)
class SessionRequest:
    """What whoever submitted a session asks of it."""

    session: str = ""
    """Id of the session."""
    rounds: int = 0
    """Rounds that the run has finished at least."""
    restart: bool = False
    """True if the run begins anew, and what is in its folder is set aside."""


PLAIN_REQUEST = SessionRequest()
"""Go on, or begin if there is nothing to go on from."""


def make_ready(folder: Path, request: SessionRequest) -> bool:
    """Set aside what is in the folder, if that is asked for; returns whether a run goes on there.

    Raises UnusableError if the folder holds something else, or nothing of the rounds that are finished.
    """
    if request.restart:
        set_aside(folder)
    goes_on = (folder / "config.yaml").is_file()
    if goes_on or request.restart:
        return goes_on
    if request.rounds:
        raise UnusableError(
            f"the run folder {folder} on the server is gone, with its {request.rounds} finished rounds; "
            "put it back, or begin anew with: splitft deploy submit ... --restart"
        )
    if folder.exists() and not folder.is_dir():
        raise UnusableError(
            f"{folder} on the server is a file, not a run folder; remove it, or give another --out"
        )
    if folder.is_dir() and any(one.name != LOCK for one in folder.iterdir()):
        raise UnusableError(
            f"{folder} on the server holds files but no run (no config.yaml), as after a part was deleted; "
            "set them aside and begin anew with: splitft deploy submit ... --restart"
        )
    return False


def check_kept(folder: Path) -> None:
    """Raise UnusableError if somebody has deleted or moved the run folder while the run trains."""
    if not (folder / "config.yaml").is_file():
        raise UnusableError(
            f"the run folder {folder} on the server was deleted or moved while the run was training; put it "
            "back, or begin anew with: splitft deploy submit ... --restart"
        )


def set_aside(folder: Path) -> Path | None:
    """Move the content of a folder to a new one beside it, and return that; None if it is empty."""
    content = [one for one in folder.iterdir() if one.name != LOCK] if folder.is_dir() else []
    if not content:
        return None
    beside = next(
        path for n in count(1) if not (path := folder.with_name(f"{folder.name}.before-{n}")).exists()
    )
    try:
        beside.mkdir()
        for one in content:
            os.replace(one, beside / one.name)
    except OSError as error:
        raise UnusableError(f"{folder} cannot be moved to {beside} ({error.strerror})") from error
    return beside
