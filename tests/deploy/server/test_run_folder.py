"""A session starts only in a folder that holds its run, or nothing; the message says how to begin anew."""

from __future__ import annotations

import shutil

import pytest

from splitft.deploy.server.run_folder import SessionRequest, UnusableError, check_kept, make_ready
from splitft.run.lock import hold


@pytest.fixture
def folder(tmp_path):
    """The folder of a run, which this process holds."""
    folder = tmp_path / "runs" / "first"
    with hold(folder, "a test"):
        yield folder


def test_a_run_begins_in_an_empty_folder_and_goes_on_where_there_is_one(folder):
    assert make_ready(folder, SessionRequest()) is False
    (folder / "config.yaml").touch()
    assert make_ready(folder, SessionRequest(rounds=3)) is True


def test_rounds_that_are_gone_are_missed(folder):
    with pytest.raises(UnusableError, match=r"is gone, with its 3 finished rounds; .* --restart"):
        make_ready(folder, SessionRequest(rounds=3))


def test_files_without_a_run_are_not_used(folder):
    (folder / "checkpoints").mkdir()
    with pytest.raises(UnusableError, match=r"holds files but no run .* --restart"):
        make_ready(folder, SessionRequest())


def test_restart_sets_everything_aside_and_loses_nothing(folder):
    for number in (1, 2):
        (folder / "config.yaml").write_text(f"run {number}")
        assert make_ready(folder, SessionRequest(rounds=3, restart=True)) is False
        assert (folder.parent / f"first.before-{number}" / "config.yaml").read_text() == f"run {number}"
    assert make_ready(folder, SessionRequest(restart=True)) is False
    assert len(list(folder.parent.iterdir())) == 3


@pytest.mark.fault("the run folder is replaced as the run trains", "it is noticed; the session ends")
def test_a_folder_that_is_deleted_while_the_run_trains_is_noticed(folder):
    (folder / "config.yaml").touch()
    check_kept(folder)
    shutil.rmtree(folder)
    with pytest.raises(UnusableError, match="was deleted or moved while the run was training"):
        check_kept(folder)
