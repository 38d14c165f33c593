"""Parties of a run over FLARE are killed with SIGKILL, and the run ends as it should.

Each takes one to three minutes, so they run only where SPLITFT_SLOW=1 asks for them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile

import psutil
import pytest

from fault_record import stood_still_s
from runs import settings_file
from splitft.config import load
from splitft.deploy.flare import poc
from splitft.tracking.events import StepDone
from splitft.tracking.log import read_events, settled

pytest.importorskip("nvflare")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("SPLITFT_SLOW"), reason="minutes long; SPLITFT_SLOW=1 runs them"),
]
EVERYONE = ("client-1", "client-2", "client-3")


@pytest.fixture
def run(tmp_path, tiny_llama, monkeypatch):
    """Runs a federation, and calls the test at the first step of a round."""

    def play(kill, in_round: int, sections=(), **deploy):
        (tmp_path / "scratch").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
        training = {"rounds": 6, "steps": 120, "batch_size": 2}
        deploy = {"silence_s": 6, **deploy}
        file = settings_file(tmp_path, tiny_llama, training=training, deploy=deploy, **dict(sections))
        done = []

        def listener(event):
            if isinstance(event, StepDone) and event.round == in_round and not done:
                done.append(kill(tmp_path / "scratch"))

        ended = poc.run_poc(load(file, []), tmp_path / "run", listeners=[listener], say=print)
        assert done
        return ended, settled(read_events(ended.folder / "events.jsonl"))

    return play


def kill(folder, *words: str) -> int:
    """SIGKILL every process of a federation whose command line has these words; returns how many."""
    killed = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if str(folder) in line and all(word in line for word in words):
                os.kill(process.pid, signal.SIGKILL)
                killed += 1
    assert killed
    return killed


def of(events, kind: str) -> list:
    return [event for event in events if event.event == kind]


@pytest.mark.fault(
    "kill -9 of the session's process on the server", "the round is trained once more; nothing else changes"
)
def test_a_job_process_that_is_killed_costs_its_round_once_more_and_nothing_else(run, record_property):
    ended, events = run(lambda folder: kill(folder, "client.worker_process", "kits/client-2"), 2)
    record_property("recovery_s", stood_still_s(events))
    assert [session.sites for session in of(events, "SessionStarted")] == [EVERYONE, EVERYONE]
    assert [event.participants for event in of(events, "RoundDone")] == [EVERYONE] * 6
    steps = [event.step for event in of(events, "StepDone") if event.client == "client-2"]
    assert steps == list(range(6 * 120))
    assert ended.summary["finished"]


@pytest.mark.fault("kill -9 of all processes of a site", "the others go on; it is back in the next session")
def test_a_site_that_is_killed_as_a_whole_is_back_in_the_next_session(run, record_property):
    ended, events = run(lambda folder: kill(folder, "kits/client-2"), 2)
    record_property("recovery_s", stood_still_s(events))
    lost, sessions = of(events, "SiteChanged"), of(events, "SessionStarted")
    assert [(event.site, event.state) for event in lost] == [("client-2", "lost")]
    participants = [event.participants for event in of(events, "RoundDone")]
    assert ("client-1", "client-3") in participants
    assert [session.sites for session in sessions] == [EVERYONE, EVERYONE]
    assert sessions[1].round - lost[0].round <= 3
    assert participants[-1] == EVERYONE
    assert len(participants) == 6
    assert ended.summary["finished"]


@pytest.mark.fault("kill -9 of all processes of the server", "the run goes on after the last finished round")
def test_a_run_survives_the_death_of_the_whole_server(run, record_property):
    ended, events = run(lambda folder: kill(folder, "kits/localhost"), 3)
    record_property("recovery_s", stood_still_s(events))
    assert len(of(events, "SessionStarted")) == 2
    assert [event.round for event in of(events, "RoundDone")] == [1, 2, 3, 4, 5, 6]
    assert [event.participants for event in of(events, "RoundDone")][-1] == EVERYONE
    steps = [event.step for event in of(events, "StepDone") if event.client == "client-1"]
    assert steps == list(range(6 * 120))
    assert ended.summary["finished"]


@pytest.mark.parametrize("mode", ["shared", "shared-in-turn", "shared-by-arrival"])
@pytest.mark.fault(
    "kill -9 of all processes of a site in a step on shared factors, {mode}",
    "the others go on; it is back in the next session",
)
def test_a_site_that_is_killed_in_a_step_on_shared_factors_does_not_hold_up_the_others(
    run, record_property, mode
):
    shared = {"split": {"server_adapters": mode}}
    ended, events = run(lambda folder: kill(folder, "kits/client-2"), 2, shared)
    record_property("recovery_s", stood_still_s(events))
    assert ("client-2", "lost") in [(event.site, event.state) for event in of(events, "SiteChanged")]
    participants = [event.participants for event in of(events, "RoundDone")]
    assert ("client-1", "client-3") in participants
    assert participants[-1] == EVERYONE
    assert len(participants) == 6
    for name in ("client-1", "client-3"):
        assert [one.step for one in of(events, "StepDone") if one.client == name] == list(range(6 * 120))
    assert ended.summary["finished"]
