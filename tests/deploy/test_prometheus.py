"""The metrics of a run, asked for over HTTP and read by a parser of the text format."""

from __future__ import annotations

import json
import math
import re
import socket
import time
import urllib.error
import urllib.request

import pytest

from splitft.deploy import prometheus
from splitft.deploy.prometheus import (
    MetricsServer,
    read_statuses,
    status_file,
    status_written,
    to_prometheus,
    write_status,
)
from splitft.deploy.server.run_totals import RunTotals
from splitft.deploy.server.status import RunStatus
from splitft.errors import DeployError
from splitft.tracking.events import RoundUndone, SessionStarted, SiteChanged, UpdatesBounded
from tracking.story import ANN, BOB, story

SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)$")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\\\|\\"|\\n)*)"(?:,|$)')


def parsed(text: str) -> dict[tuple, float]:
    """Samples of the text format 0.0.4 by name and labels; fails for what Prometheus would refuse."""
    assert text.endswith("\n")
    kinds, samples, names = {}, {}, []
    for line in text.splitlines():
        if line.startswith("# HELP "):
            assert line.split(" ", 3)[3]
            continue
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert kind in ("counter", "gauge")
            assert name not in kinds, f"{name} has two blocks"
            kinds[name] = kind
            continue
        name, inside, value = SAMPLE.match(line).groups()
        assert name in kinds, f"{name} has no TYPE before it"
        assert kinds[name] == "gauge" or name.endswith("_total")
        if name not in names:
            names.append(name)
        assert names[-1] == name, f"the samples of {name} are not together"
        labels = LABEL.findall(inside or "")
        assert ",".join(f'{key}="{text}"' for key, text in labels) == (inside or "")
        key = (name, *sorted(labels))
        assert key not in samples, f"{key} is there twice"
        samples[key] = float(value)
    return samples


def fetched(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as reply:
        assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return reply.read().decode("utf-8")


@pytest.fixture
def status():
    """The status of the story's run, and of a site that was refused in it."""
    known, totals = RunStatus((ANN, BOB), 2), RunTotals()
    begun = SessionStarted(round=1, sites=(ANN, BOB))
    refused = SiteChanged(round=2, site=BOB, state="refused", reason="a NaN")
    bounded = UpdatesBounded(round=1, scale={BOB: 0.1}, limit=5.0, typical=1.0)
    undone = RoundUndone(round=2, reason="no site finished it", in_a_row=1)
    for event in (begun, *story(), refused, refused, bounded, undone):
        known(event)
        totals(event)
    data = {**totals.as_data(), "silence_s": 60.0, "disk_free_bytes": 5e10, "disk_bytes": 1e11}
    return {**data, **known.as_data({ANN: 3.0})}


def test_a_scrape_has_the_numbers_of_the_run(tmp_path, status):
    write_status(status_file(tmp_path, "first"), status, running=True)
    server = MetricsServer(tmp_path / "status", 0)
    try:
        found = parsed(fetched(server.port))
    finally:
        server.close()

    def value(name, **labels):
        return found[("splitft_" + name, *sorted({"run": "first", **labels}.items()))]

    assert found[("splitft_up",)] == 1
    assert (value("rounds"), value("rounds_done"), value("session_running")) == (2, 2, 1)
    assert value("held_out_loss") == 3.0
    assert ("splitft_held_out_accuracy", ("run", "first")) not in found  # no site has told it
    assert (value("steps_total"), value("tokens_total")) == (6, 120)
    assert value("step_seconds_total", leg="server_forward") == 3.0
    assert value("bytes_total", purpose="training", role="hidden", direction="up") == 720
    assert value("bytes_total", purpose="training", role="adapter", direction="down") == 6200
    assert value("bytes_total", purpose="evaluation", role="hidden", direction="up") == 77
    assert (value("sites", state="training"), value("sites", state="refused")) == (1, 1)
    assert value("sites", state="lost") == 0
    assert 3.0 <= value("site_heard_seconds", site=ANN) < 20.0
    assert ("splitft_site_heard_seconds", ("run", "first"), ("site", BOB)) not in found
    assert (value("site_troubles_total", site=BOB, state="refused"), value("refusals_total")) == (2, 2)
    assert (value("site_troubles_total", site=BOB, state="bounded"), value("rounds_undone_total")) == (1, 1)
    assert value("alerts") == 4  # Bob is refused, twice; his update was bounded; a round was undone


def test_names_and_numbers_of_all_kinds_are_spelled_as_the_format_has_them():
    site = {"name": 'a"\\\nb', "state": "training", "heard_s_ago": 0.0, "held_out": math.nan}
    status = {"t": 0.0, "sites": [site], "eval_loss": math.inf, "seconds": {"head": 1e-9}}
    found = parsed(to_prometheus({"r": status}, 5.0))
    assert found[("splitft_held_out_loss", ("run", "r"))] == math.inf
    assert math.isnan(found[("splitft_site_held_out_loss", ("run", "r"), ("site", r"a\"\\\nb"))])
    assert found[("splitft_status_age_seconds", ("run", "r"))] == 5.0


def test_only_this_machine_is_answered_and_only_with_metrics(tmp_path):
    server = MetricsServer(tmp_path, 0)
    try:
        assert parsed(fetched(server.port)) == {("splitft_up",): 1}  # no run yet
        with pytest.raises(urllib.error.HTTPError, match="404"):
            fetched(server.port, "/status/../secret")
        with pytest.raises(DeployError, match=f"127.0.0.1:{server.port}.*give another --metrics-port"):
            MetricsServer(tmp_path, server.port)
        assert server._server.server_address[0] == "127.0.0.1"
        with socket.create_connection(("127.0.0.1", server.port)) as half:  # a request that never ends
            half.sendall(b"GET /metr")
            assert fetched(server.port)
    finally:
        server.close()


def test_a_session_writes_its_status_until_it_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(prometheus, "STATUS_S", 0.05)
    path, count = status_file(tmp_path, "first"), iter(range(1000))
    with status_written(path, lambda: {"rounds_done": next(count)}):
        deadline = time.monotonic() + 20
        while json.loads(path.read_text())["rounds_done"] < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert json.loads(path.read_text())["running"]
    assert not json.loads(path.read_text())["running"]
    found = parsed(to_prometheus(read_statuses(tmp_path / "status"), time.time()))
    assert found[("splitft_session_running", ("run", "first"))] == 0


def test_a_status_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    (tmp_path / "status").write_text("a file where the folder should be")
    with status_written(status_file(tmp_path, "first"), dict):
        pass
    assert "the status for metrics cannot be written" in caplog.text


def test_damaged_and_old_statuses_are_left_out(tmp_path):
    for number in range(prometheus.RUNS_KEPT + 3):
        write_status(tmp_path / f"run-{number:02d}.json", {}, running=False)
    (tmp_path / "torn.json").write_text("{")
    (tmp_path / "foreign.json").write_text("[]")
    found = read_statuses(tmp_path)
    assert "torn" not in found
    assert "foreign" not in found
    assert len(list(tmp_path.glob("*.json"))) == prometheus.RUNS_KEPT
