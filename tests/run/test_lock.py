"""One process at a time trains into a run folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from runs import invoke, settings_file, started
from splitft.errors import BusyError, RunError
from splitft.run.lock import LOCK, check_free, hold

HOLDER = """
import sys, time
from pathlib import Path
from splitft.run.lock import hold
with hold(Path(sys.argv[1]), "a test"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds a run folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "run"], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_that_another_process_holds_is_refused_with_its_name(tmp_path, holder):
    for ask in (lambda: check_free(tmp_path / "run"), hold(tmp_path / "run", "us").__enter__):
        with pytest.raises(BusyError, match=rf"a test, process {holder.pid} on .*; wait for it"):
            ask()


@pytest.mark.fault("kill -9 of a process that holds a run folder", "the next one takes it")
def test_a_process_that_is_killed_holds_nothing(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK).is_file()
    check_free(tmp_path / "run")
    with hold(tmp_path / "run", "us"):
        pass


def test_nothing_is_left_of_a_lock(tmp_path):
    with hold(tmp_path / "above" / "run", "us"):
        pass
    assert not list(tmp_path.iterdir())
    (tmp_path / "kept").mkdir()
    with hold(tmp_path / "kept", "us"):
        (tmp_path / "kept" / "file").touch()
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["file"]


def test_a_holder_that_lets_go_at_once_is_waited_for(tmp_path, holder):
    (tmp_path / "other").mkdir()
    with hold(tmp_path / "other", "us"):
        check_free(tmp_path / "run/none")
    holder.send_signal(signal.SIGKILL)
    with hold(tmp_path / "run", "us"):
        pass


def test_what_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunError, match=r"cannot be written \(Not a directory\)"),
        hold(tmp_path / "file" / "run", "us"),
    ):
        pass


@pytest.mark.slow
@pytest.mark.fault("a second `train` into a folder in use", "refused with the process that holds it")
def test_a_second_train_into_a_folder_in_use_is_one_clear_message(tmp_path, tiny_llama):
    file = settings_file(tmp_path, tiny_llama, training={"rounds": 400})
    first = started("train", file, "--out", tmp_path / "run")
    while not (tmp_path / "run" / "summary.json").is_file():
        assert first.poll() is None
    for verb in (("train",), ("deploy", "poc")):
        again = invoke(*verb, file, "--resume", "--out", tmp_path / "run")
        assert again.exit_code == 2
        assert f"is being trained into by splitft train, process {first.pid}" in again.stderr
        assert again.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "logs").exists()
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 130, errors
    assert not (tmp_path / "run" / LOCK).exists()
