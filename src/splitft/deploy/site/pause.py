"""Let a data owner pause a site: it stays connected and takes no part in runs until it is resumed.

    KIT/local/paused    exists while the site is paused

The file is looked at before a session opens anything, and before each order and each step of a session
underway, so a pause ends the site's part within one step.
"""

from __future__ import annotations

from pathlib import Path

from splitft.errors import ForbiddenError
from splitft.files import write_whole

PAUSED = "paused"
MESSAGE = "paused by its owner"


def pause(owner: Path) -> None:
    """Pause the site; `owner` is its kit's folder `local`."""
    write_whole(owner / PAUSED, f"{MESSAGE}\n")


def resume(owner: Path) -> bool:
    """Let the site take part again; returns whether it was paused."""
    was = is_paused(owner)
    (owner / PAUSED).unlink(missing_ok=True)
    return was


def is_paused(owner: Path) -> bool:
    """Return whether the owner has paused the site."""
    return (owner / PAUSED).exists()


def refuse_paused(owner: Path) -> None:
    """Raise ForbiddenError if the owner has paused the site."""
    if is_paused(owner):
        raise ForbiddenError(MESSAGE)
