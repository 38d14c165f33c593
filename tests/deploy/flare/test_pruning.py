"""Of finished jobs the last ones stay; what runs, or is not known to be finished, is not touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid

import pytest

pytest.importorskip("nvflare")

from splitft.deploy.flare.pruning import JOBS_KEPT, STORE, prune, running_jobs


def _job(kit, age: int, state: str | None = None) -> str:
    """A job's folder in the kit, and in the store where it has a state; `age` in minutes."""
    job = str(uuid.uuid4())
    folders = [kit / job] + ([kit / STORE / job] if state else [])
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "log.txt").write_text("a log")
    if state:
        (folders[1] / "meta").write_text(json.dumps({"job_id": job, "status": state}))
        (folders[1] / "workspace").write_bytes(b"result")
    for folder in folders:
        os.utime(folder, (1e9 - 60 * age,) * 2)
    return job


@pytest.fixture
def kit(tmp_path):
    for folder in ("startup", "local", "storage/jobs", "runs/first/north", "transfer"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "kept").write_text("kept")
    return tmp_path


def _jobs(folder) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir() and len(path.name) == 36}


def test_the_last_finished_jobs_stay(kit):
    jobs = [_job(kit, age, "FINISHED:COMPLETED") for age in range(JOBS_KEPT + 4)]
    running, submitted = _job(kit, 900, "RUNNING"), _job(kit, 901, "SUBMITTED")
    unreadable = _job(kit, 902, "FINISHED:COMPLETED")
    (kit / STORE / unreadable / "meta").write_text("{")
    left = {*jobs[:JOBS_KEPT], running, submitted, unreadable}
    assert prune(kit) == sorted(jobs[JOBS_KEPT:])
    assert _jobs(kit / STORE) == _jobs(kit) == left
    assert len(list(kit.rglob("kept"))) == 5
    assert list(kit.rglob("*.old")) == []
    assert prune(kit) == []


def test_a_site_keeps_the_last_jobs_and_the_one_that_runs(kit):
    """A process with kit and job on its command line, as FLARE starts it."""
    jobs = [_job(kit, age) for age in range(JOBS_KEPT + 3)]
    oldest = jobs[-1]
    words = ["nvflare.private.fed.app.client.worker_process", "-m", str(kit.resolve()), "-n", oldest]
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()", *words], stdin=subprocess.PIPE
    )
    try:
        assert running_jobs(kit) == {oldest}
        assert prune(kit) == sorted(jobs[JOBS_KEPT:-1])
        assert _jobs(kit) == {*jobs[:JOBS_KEPT], oldest}
    finally:
        process.stdin.close()
        process.wait()
    assert prune(kit) == [oldest]


def test_links_and_other_folders_are_not_followed(kit, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "precious").write_text("x")
    link = kit / str(uuid.uuid4())
    link.symlink_to(elsewhere)
    for age in range(JOBS_KEPT + 2):
        _job(kit, age)
    prune(kit)
    assert (elsewhere / "precious").exists()
    assert link.is_symlink()
