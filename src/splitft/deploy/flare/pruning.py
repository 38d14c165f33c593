"""Delete what FLARE keeps of finished jobs: a run of many sessions would fill the disks of all parties.

    server's kit/storage/jobs/JOB   the job and its result: the last JOBS_KEPT finished ones stay
    any kit/JOB                     log and configuration: of the last JOBS_KEPT jobs, and of each that runs

A run's own folder is not touched: it holds its checkpoints, events and adapter. A job that a process of the
kit has on its command line is never deleted, nor one that FLARE does not call finished.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

from splitft.deploy.flare.processes import processes_of

JOBS_KEPT = 5
"""Finished jobs of which everything stays."""
STORE = Path("storage") / "jobs"
"""FLARE's store of jobs in the server's kit (`provisioning.prepare_kit`)."""


def prune(kit: Path) -> list[str]:
    """Delete old finished jobs of a kit; returns their ids."""
    running = running_jobs(kit)
    unfinished, stored = set(running), _job_folders(kit / STORE)
    finished = []
    for folder in stored:
        if folder.name in running or not _is_finished(folder):
            unfinished.add(folder.name)
        else:
            finished.append(folder)
    local = [folder for folder in _job_folders(kit) if folder.name not in unfinished]
    gone = [*finished[:-JOBS_KEPT], *local[:-JOBS_KEPT]]
    for folder in gone:
        _delete(folder)
    return sorted({folder.name for folder in gone})


def running_jobs(kit: Path) -> set[str]:
    """Return the jobs for which a process of this kit runs."""
    words: set[str] = set()
    for process in processes_of(kit):
        with contextlib.suppress(Exception):  # it has ended meanwhile
            words.update(process.cmdline())
    return {word for word in words if _is_job_id(word)}


def _job_folders(parent: Path) -> list[Path]:
    """Return the folders named after a job, the oldest first."""
    if not parent.is_dir():
        return []
    found: list[tuple[float, Path]] = []
    for path in parent.iterdir():
        with contextlib.suppress(OSError):
            if _is_job_id(path.name) and path.is_dir() and not path.is_symlink():
                found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found)]


def _is_finished(stored: Path) -> bool:
    """Return whether FLARE calls a job in its store finished; False if that cannot be read."""
    try:
        status = json.loads((stored / "meta").read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return isinstance(status, str) and status.startswith("FINISHED")


def _is_job_id(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


def _delete(folder: Path) -> None:
    """Delete a folder; it is renamed first, so that FLARE sees all of it or nothing."""
    hidden = folder.with_name(f".{folder.name}.old")
    with contextlib.suppress(OSError):
        os.replace(folder, hidden)
    for rest in _leftovers(folder.parent):
        shutil.rmtree(rest, ignore_errors=True)


def _leftovers(parent: Path) -> Iterable[Path]:
    """Return renamed folders, also those that an earlier process did not finish deleting."""
    return parent.glob(".*.old")
