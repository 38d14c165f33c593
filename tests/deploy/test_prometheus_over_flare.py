"""Whoever operates a federation of real processes sees its run: metrics by HTTP, and status in any encoding.

About a minute, and only where SPLITFT_SLOW=1 asks for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
import urllib.error
import urllib.request

import pytest
import yaml

from deploy.test_prometheus import parsed
from laws.federations import write_text
from runs import COMMAND, settings

pytest.importorskip("nvflare")
from splitft.deploy.flare.poc import free_port
from splitft.deploy.flare.provisioning import ADMIN, SUBMITTER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("SPLITFT_SLOW"), reason="a minute long; SPLITFT_SLOW=1 runs it"),
]
SITES = ("north", "south")
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _run(folder, *arguments, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=folder,
        env={**QUIET, **environment},
        capture_output=True,
        timeout=200,
    )


def _scrape(port: int) -> dict:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        return parsed(reply.read().decode())


def _wait_for(port: int, name: str, at_least: float, seconds: float = 150.0) -> dict:
    deadline, found = time.monotonic() + seconds, {}
    while time.monotonic() < deadline:
        with contextlib.suppress(urllib.error.URLError):  # until the server's process has started
            found = _scrape(port)
        if found.get((name, ("run", "run")), -1.0) >= at_least:
            return found
        time.sleep(0.5)
    pytest.fail(f"{name} did not reach {at_least}: {found}")


def test_a_run_is_seen_while_it_trains_and_afterwards(tmp_path, tiny_llama):
    port, text = free_port(), write_text(tmp_path / "notes.jsonl")
    config = settings(
        tiny_llama, text, training={"rounds": 3, "steps": 30}, clients={"count": 2, "cuts": [1, 2]},
        deploy={"sites": list(SITES), "server": "localhost", "port": free_port(), "min_clients": 2},
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    made = _run(tmp_path, "deploy", "provision", "run.yaml", "--to", "kits")
    assert made.returncode == 0, made.stderr
    for site in SITES:
        (tmp_path / "kits" / site / "local/site.yaml").write_text(
            yaml.safe_dump({"text": {"source": str(text)}})
        )
    starts = [("kits/localhost", "--metrics-port", port), *((f"kits/{site}",) for site in SITES)]
    services = [
        subprocess.Popen([*COMMAND, "deploy", "start", *map(str, words)], cwd=tmp_path, env=QUIET)
        for words in starts
    ]
    try:
        submit = subprocess.Popen(
            [*COMMAND, "deploy", "submit", "run.yaml", "--kit", f"kits/{SUBMITTER}", "--out", "runs/run"],
            cwd=tmp_path,
            env={**QUIET, "PYTHONIOENCODING": "ascii"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        found = _wait_for(port, "splitft_steps_total", 1)
        assert found[("splitft_session_running", ("run", "run"))] == 1
        assert found[("splitft_sites", ("run", "run"), ("state", "training"))] == 2
        assert found[("splitft_site_heard_seconds", ("run", "run"), ("site", "north"))] < 60
        status = _run(
            tmp_path, "deploy", "status", "--kit", f"kits/{ADMIN}", "--once", PYTHONIOENCODING="ascii"
        )
        assert status.returncode == 0, status.stderr
        assert "north" in status.stdout.decode("ascii")
        output, errors = submit.communicate(timeout=200)
        assert submit.returncode == 0, (output, errors)
        output.decode("ascii")
        # and when the job has gone
        found = _wait_for(port, "splitft_rounds_done", 3)
        summary = json.loads((tmp_path / "runs/run/summary.json").read_text())
        assert found[("splitft_held_out_loss", ("run", "run"))] == pytest.approx(summary["eval_loss"][-1])
        assert found[("splitft_steps_total", ("run", "run"))] == summary["steps"] == 180
        for role, counts in summary["bytes"].items():
            for direction, count in counts.items():
                labels = {"run": "run", "purpose": "training", "role": role, "direction": direction}
                assert found.get(("splitft_bytes_total", *sorted(labels.items())), 0) == count
        assert found[("splitft_refusals_total", ("run", "run"))] == 0
    finally:
        for service in services:
            service.terminate()
        for service in services:
            service.wait(60)
