"""What docs/deployment.md says, from nothing to a finished run: a server and two sites, a machine each.

The machines are network namespaces, so that a cable can be pulled. Two to three minutes, so it runs only
where SPLITFT_SLOW=1 asks for it, and root may make namespaces.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from itertools import pairwise

import pytest
import yaml

from deploy.machines import machines, possible
from fault_record import stood_still_s
from laws.federations import write_text
from runs import COMMAND, settings, started
from splitft.tracking.log import read_events, settled

pytest.importorskip("nvflare")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("SPLITFT_SLOW"), reason="minutes long; SPLITFT_SLOW=1 runs them"),
]
SERVER, SITES = "fl.example.org", ("north", "south")
SUBMITTER = "submitter@splitft.local"
CUT_S = 20.0
TRAINING = {"rounds": 3, "steps": 200}


class Organisations:
    """The machines, each with a folder, and the commands that people type on them."""

    def __init__(self, folder, made):
        self.folder, self.machines = folder, made

    def run(self, machine, *words, status=0):
        """A command on a machine, from its own folder; returns what it says."""
        done = subprocess.run(
            [*self.machines.on(machine), *COMMAND, *map(str, words)],
            cwd=self.folder / machine, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    def start(self, machine, *words):
        """A command that stays."""
        return started(*words, before=self.machines.on(machine), cwd=self.folder / machine)

    def status(self):
        """What `status --json` says; nothing while it cannot say anything."""
        done = subprocess.run(
            [*self.machines.on("hub"), *COMMAND, "deploy", "status", "--kit", SUBMITTER, "--json"],
            cwd=self.folder / "hub", capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        return json.loads(done.stdout) if done.returncode == 0 else {}

    def until(self, true, seconds=120):
        """Wait until the status is as it should be, and return it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if true(now := self.status()):
                return now
            time.sleep(1)
        raise AssertionError(f"waited in vain: {now}")


@pytest.fixture(scope="module")
def organisations(tmp_path_factory, tiny_llama):
    """A federation that runs: kits made at the hub and carried to where they belong."""
    if not possible():
        pytest.skip("no network namespaces here")
    folder = tmp_path_factory.mktemp("organisations")
    with machines("hub", SITES, SERVER) as made:
        us = Organisations(folder, made)
        for name in ("hub", *SITES):
            (folder / name).mkdir()
        run = settings(
            tiny_llama, "python-docs", training=TRAINING,
            clients={"count": 2, "cuts": [1, 2]},
            deploy={"sites": list(SITES), "server": SERVER, "min_clients": 2},
        )  # fmt: skip
        (folder / "hub" / "run.yaml").write_text(yaml.safe_dump(run))
        us.run("hub", "deploy", "provision", "run.yaml", "--to", "kits")
        for name in SITES:
            shutil.move(folder / "hub/kits" / name, folder / name / name)
            own = write_text(folder / name / "notes.jsonl", seed=SITES.index(name))
            (folder / name / name / "local/site.yaml").write_text(
                yaml.safe_dump({"text": {"source": str(own)}})
            )
            shutil.copy(folder / "hub/run.yaml", folder / name)
            said = us.run(name, "deploy", "site", f"{name}/local/site.yaml", "--check", "--run", "run.yaml")
            assert "fits run.yaml: this site would take part" in said
        shutil.move(folder / "hub/kits" / SUBMITTER, folder / "hub" / SUBMITTER)
        services = [us.start("hub", "deploy", "start", f"kits/{SERVER}")]
        services += [us.start(name, "deploy", "start", name) for name in SITES]
        try:
            yield us
        finally:
            for service in services:
                service.terminate()
            assert [service.wait(60) for service in services] == [130] * 3


@pytest.mark.fault("a site's network is down for 20 s", "no step is lost, no event")
def test_a_cable_that_is_pulled_for_20_s_costs_no_step_and_all_is_as_the_page_says(
    organisations, record_property
):
    us = organisations
    submit = us.start("hub", "deploy", "submit", "run.yaml", "--kit", SUBMITTER, "--out", "runs/first")
    now = us.until(lambda now: all(site["steps"] > 20 for site in now.get("sites", [{"steps": 0}])))
    assert (now["state"], now["run"], now["connected"]) == ("RUNNING", "first", list(SITES))
    assert [(site["name"], site["cut"]) for site in now["sites"]] == [("north", 1), ("south", 2)]
    us.machines.cut("south", CUT_S)
    table = us.run("hub", "deploy", "status", "--kit", SUBMITTER, "--once")
    assert "tokens/s in all" in table
    assert "north" in us.run("hub", "deploy", "logs", "--kit", SUBMITTER)
    said, errors = submit.communicate(timeout=240)
    assert submit.returncode == 0, errors
    assert "session 1: north, south" in said
    assert "round 3 of 3 is done" in said or "Run folder" in said
    events = settled(read_events(us.folder / "hub/runs/first/events.jsonl"))
    assert not [event for event in events if event.event == "SiteChanged"]
    assert [event.participants for event in events if event.event == "RoundDone"] == [SITES] * 3
    for name in SITES:
        steps = [event for event in events if event.event == "StepDone" and event.client == name]
        assert [event.step for event in steps] == list(range(3 * TRAINING["steps"]))
    gaps = [after.t - before.t for before, after in pairwise(steps)]
    assert CUT_S - 2 < max(gaps) < CUT_S + 15
    record_property("recovery_s", max(gaps) - CUT_S)
    own = us.run("hub", "deploy", "logs", "--kit", SUBMITTER, "--party", "north")
    assert own.startswith("north: (")  # why it is not here: a site's log stays with it
    assert list((us.folder / "north" / "north").glob("*/log.txt"))
    ended = us.run("hub", "deploy", "stop", "--kit", SUBMITTER, status=2)
    assert "nothing runs" in ended


@pytest.mark.fault("`deploy stop`, then a second `submit`", "it goes on after the last finished round")
def test_a_run_that_is_stopped_goes_on_where_it_was_with_the_next_submit(organisations, record_property):
    us = organisations
    words = ("deploy", "submit", "run.yaml", "training.rounds=4", "--kit", SUBMITTER, "--out", "runs/second")
    submit = us.start("hub", *words)
    us.until(lambda now: now.get("run") == "second" and now.get("rounds_done", 0) >= 1)
    assert "stopped second" in us.run("hub", "deploy", "stop", "--kit", SUBMITTER)
    said, errors = submit.communicate(timeout=120)
    assert (submit.returncode, "the same `submit` goes on from there" in said) == (130, True), said + errors
    us.run("hub", *words)
    events = read_events(us.folder / "hub/runs/second/events.jsonl")
    assert [event.reason for event in events if event.event == "SessionEnded"] == ["stopped", "finished"]
    assert [event.round for event in events if event.event == "RoundDone"][-1] == 4
    steps = [event.step for event in settled(events) if event.event == "StepDone" and event.client == "north"]
    assert steps == list(range(4 * TRAINING["steps"]))
    record_property("recovery_s", stood_still_s(settled(events)))
