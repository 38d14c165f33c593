"""A run that is submitted ends well, whatever dies, stops or is deleted underway, and says what happened.

Real processes over FLARE; half a minute to three minutes each, so only where SPLITFT_SLOW=1 asks for them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time

import pytest

from deploy.local_federation import SITES, local_federation
from fault_record import stood_still_s
from splitft.tracking.log import read_events, settled

pytest.importorskip("nvflare")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("SPLITFT_SLOW"), reason="minutes long; SPLITFT_SLOW=1 runs them"),
]
ROUNDS, STEPS = 4, 60
LONGER = 200
"""Steps of a round in runs that have to last while other commands start."""
MORE = f"training.steps={LONGER}"


@pytest.fixture(scope="module")
def federation(tmp_path_factory, tiny_llama):
    with local_federation(tmp_path_factory.mktemp("federation"), tiny_llama) as made:
        yield made


def finished(federation, name, submit, steps=STEPS, seconds=420):
    """What `submit` said, after it has ended well with all rounds and each step once."""
    said, errors = submit.communicate(timeout=seconds)
    assert submit.returncode == 0, said + errors
    events = settled(read_events(federation.folder / "copies" / name / "events.jsonl"))
    assert [event.round for event in events if event.event == "RoundDone"] == list(range(1, ROUNDS + 1))
    for site in SITES:
        taken = [e.step for e in events if e.event == "StepDone" and e.client == site]
        assert taken == list(range(ROUNDS * steps))
    print(said)
    return said


KILLS = {
    "the server, in its second round": (2, [False]),
    "the session's job on the server, in its third round": (3, [True]),
    "both at once, in the first round": (1, [True, False]),
}


@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.fault(
    "kill -9 during `deploy submit`: {kill}",
    "it goes on after the last finished round; `submit` follows to the end",
)
def test_a_submitted_run_survives_the_death_of(federation, kill, record_property):
    number, kinds = KILLS[kill]
    name = f"run-{list(KILLS).index(kill)}"
    submit = federation.submit(name)
    federation.until_step(name, number)
    victims = [one for job in kinds for one in federation.processes("localhost", job)]
    assert len(victims) == len(kinds)
    federation.signal(signal.SIGKILL, victims)
    killed_t = time.time()
    said = finished(federation, name, submit)
    steps = [event.t for event in federation.events(name, "StepDone")]
    record_property("recovery_s", min(t for t in steps if t > killed_t) - killed_t)
    assert "session 1 ended: its job died" in said
    assert "session 2: north, south" in said
    ended = federation.events(name, "RoundDone")
    assert [event.round for event in ended] == list(range(1, ROUNDS + 1))  # none was trained again
    assert not federation.status()["state"].startswith("RUNNING")


@pytest.mark.fault(
    "Ctrl-C of `submit`, then a second `submit`", "it joins the running session; no event is lost"
)
def test_ctrl_c_and_a_second_submit_follow_the_one_session(federation):
    first = federation.submit("second-submit", MORE)
    federation.until_step("second-submit", 1)
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 130
    assert "the same `submit` follows it again" in errors
    other = federation.submit("second-submit", MORE, "training.rounds=9")
    _, errors = other.communicate(timeout=120)
    assert other.returncode == 2
    assert "is being trained with another configuration" in errors
    said = finished(federation, "second-submit", federation.submit("second-submit", MORE), LONGER)
    assert "a session of this run is running: following it" in said
    assert len(federation.events("second-submit", "SessionStarted")) == 1


@pytest.mark.fault("two `submit`s at the same time", "one starts the run, both see its end")
def test_of_two_submits_at_the_same_time_one_starts_the_run_and_both_see_its_end(federation):
    both = [federation.submit("at-once", MORE) for _ in range(2)]
    said = [finished(federation, "at-once", one, LONGER) for one in both]
    assert len(federation.events("at-once", "SessionStarted")) == 1
    assert sum("a session of this run is running: following it" in text for text in said) == 1


def test_abort_ends_the_running_session_and_the_submit_that_follows_it(federation):
    first = federation.submit("aborted", MORE)
    federation.until_step("aborted", 2)
    second = federation.submit("aborted", MORE, "--abort")
    said, errors = first.communicate(timeout=180)
    assert first.returncode == 130, errors
    assert "the session ends: the run was stopped" in said
    assert "the same `submit` goes on from there" in said
    assert "ending the session that is running" in finished(federation, "aborted", second, LONGER)


@pytest.mark.fault(
    "the server's processes are stopped for longer than silence_s",
    "no site is blamed; the same session goes on",
)
def test_a_server_that_was_stopped_for_a_while_blames_no_site(federation, record_property):
    submit = federation.submit("paused-server")
    federation.until_step("paused-server", 2)
    everything = federation.processes("localhost", False) + federation.processes("localhost", True)
    federation.signal(signal.SIGSTOP, everything)
    time.sleep(25)  # deploy.silence_s is 10
    federation.signal(signal.SIGCONT, everything)
    finished(federation, "paused-server", submit)
    record_property("recovery_s", stood_still_s(federation.events("paused-server", "StepDone")))
    assert not federation.events("paused-server", "SiteChanged")
    assert len(federation.events("paused-server", "SessionStarted")) == 1


@pytest.mark.fault(
    "the disk of a site is full", "the site declines with the reason; `submit` prints it; the others go on"
)
def test_a_full_disk_at_a_site_is_told_to_whoever_submitted(federation):
    runs = federation.kits.of("south") / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    runs.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", runs], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file systems can be made here")
    try:
        words = ("training.optimizer_state=keep", "aggregate.rule=factors", "deploy.min_clients=1")
        submit = federation.submit("full-disk", *words)
        said, errors = submit.communicate(timeout=300)
    finally:
        subprocess.run(["umount", "-l", runs], check=True)
    assert submit.returncode == 0, said + errors
    assert "south has failed: its disk or its system failed: No space left on device" in said
    assert "south has declined: it failed 3 times in a row: its disk" in said


@pytest.mark.fault(
    "the run folder is deleted as the run trains", "the session ends with the reason; `--restart` begins anew"
)
def test_a_run_folder_that_is_deleted_is_said_and_restart_begins_anew(federation):
    submit = federation.submit("deleted", MORE)
    federation.until_step("deleted", 2)
    shutil.rmtree(federation.run_folder("deleted"))
    said, errors = submit.communicate(timeout=180)
    assert submit.returncode == 2, said
    assert "was deleted or moved while the run was training" in errors
    assert "--restart" in errors
    (federation.run_folder("deleted") / "checkpoints").mkdir(parents=True)  # of a part that was left
    again = federation.submit("deleted", MORE)
    _, errors = again.communicate(timeout=180)
    assert again.returncode == 2
    assert "holds files but no run" in errors
    finished(federation, "deleted", federation.submit("deleted", "--restart"))
    beside = federation.run_folder("deleted").with_name("deleted.before-1")
    assert [path.name for path in beside.iterdir()] == ["checkpoints"]


@pytest.mark.fault("a site lacks the base model", "it declines; `submit` prints why")
def test_a_site_without_the_base_model_declines_and_the_reason_is_printed(federation):
    site = federation.kits.of("south") / "local/site.yaml"
    text = site.read_text()
    site.write_text(text + "model: {folder: /nowhere}\n")
    try:
        submit = federation.submit("no-model", "deploy.min_clients=1")
        said, errors = submit.communicate(timeout=240)
    finally:
        site.write_text(text)
    assert submit.returncode == 0, said + errors
    assert "south has declined: " in said
    assert "/nowhere" in said
