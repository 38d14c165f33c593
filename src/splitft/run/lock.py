"""Hold a run folder, so that two processes never train into it at the same time.

    FOLDER/.lock    locked by the operating system while its holder lives; its text says who that is

A process that is killed holds nothing any more. A file system without locks leaves the folder unprotected.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from splitft.errors import BusyError, RunError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
WAIT_S = 0.5
"""A holder that lets go within this time is waited for: `check_free` holds a folder for a moment too."""
_HELD = (errno.EAGAIN, errno.EACCES)


@contextlib.contextmanager
def hold(folder: Path, who: str) -> Iterator[None]:
    """Hold a run folder, and make it if it is missing; `who` is told to others that want it.

    Raises BusyError if another process holds it, RunError if it cannot be written. A folder that was made
    and stays empty is removed at the end.
    """
    try:
        made = _make(folder)
        handle = _locked(folder)
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error.strerror}); give another --out") from error
    try:
        with contextlib.suppress(OSError):  # such as a full disk: the lock holds without its text
            text = f"{who}, process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%F %T}"
            os.truncate(handle, 0)
            os.write(handle, text.encode())
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # before others can lock it
        os.close(handle)
        for each in made:
            with contextlib.suppress(OSError):
                each.rmdir()


def check_free(folder: Path) -> None:
    """Raise BusyError if another process holds the folder."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return
    try:
        _flock(handle, shared=True)
    except OSError as error:
        if error.errno in _HELD:
            raise _busy(folder) from error
    finally:
        os.close(handle)


def _flock(handle: int, *, shared: bool = False) -> None:
    """Lock a file that is open, without waiting. Raises OSError if another process has, or none can."""
    if fcntl is None:
        raise OSError(errno.ENOTSUP, "no locks")
    fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def _make(folder: Path) -> list[Path]:
    """Make a folder and those above it; return what was missing, the innermost first."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _locked(folder: Path) -> int:
    """Return a handle on the lock's file, which is locked."""
    until = time.monotonic() + WAIT_S
    while True:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _flock(handle)
        except OSError as error:
            if error.errno not in _HELD:
                return handle  # a file system without locks
            os.close(handle)
            if time.monotonic() > until:
                raise _busy(folder) from error
            time.sleep(WAIT_S / 10)
            continue
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), os.stat(folder / LOCK)):
                return handle
        os.close(handle)  # its last holder has removed the file meanwhile


def _busy(folder: Path) -> BusyError:
    try:
        holder = (folder / LOCK).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        holder = ""
    return BusyError(
        f"{folder} is being trained into by {holder or 'another process'}; wait for it or stop it, "
        "or give another --out"
    )
