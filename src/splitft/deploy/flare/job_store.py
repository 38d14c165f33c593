"""Settle what a dead server's process has left in FLARE's storage of jobs, before the next one starts.

    KIT/storage/jobs/JOB/meta    "status": RUNNING --settle_jobs--> FINISHED:ABNORMAL

FLARE reads the states of jobs from there when it starts, and has no process for those that it finds running:
they would run for ever.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from splitft.files import write_whole

UNFINISHED, ABNORMAL = ("RUNNING", "DISPATCHED"), "FINISHED:ABNORMAL"
"""States that need a process, and that of a job whose process has died."""


def settle_jobs(kit: Path) -> list[str]:
    """Mark the jobs as ended that have no process any more; returns their ids."""
    settled = []
    for path in sorted((kit / "storage" / "jobs").glob("*/meta")):
        with contextlib.suppress(OSError, ValueError):
            meta = json.loads(path.read_text(encoding="utf-8"))
            if meta.get("status") in UNFINISHED:
                write_whole(path, json.dumps({**meta, "status": ABNORMAL}))
                settled.append(path.parent.name)
    return settled
