"""A job's name becomes a folder on the server and on every site: only a name does."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitft.config import from_mapping
from splitft.errors import DeployError
from splitft.names import file_safe_name

pytest.importorskip("nvflare")
from splitft.deploy.flare.job import folder_of, runs_of
from splitft.deploy.flare.job_arguments import read_arguments, write_job

HOSTILE = (
    "../../../../escape", "/etc/cron.d/x", "a/b", "a\\b", "..", ".", "", "a\0", "con", "x" * 65, "x\n",
    "~root", "~root", "\x1b[2J", None, 7, ["run"], {"run": 1},
)  # fmt: skip


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """What an honest submitter sends."""
    job = write_job(tmp_path_factory.mktemp("jobs") / "job", "first", from_mapping({}))
    config = json.loads((job / "app/config/config_fed_client.json").read_text(encoding="utf-8"))
    return config["executors"][0]["executor"]["args"]


@pytest.mark.parametrize("name", HOSTILE, ids=repr)
@pytest.mark.hostile("a run is named {id}", "refused at server and site")
def test_a_hostile_submitters_name_is_refused_at_server_and_site(arguments, name):
    with pytest.raises(DeployError) as caught:
        read_arguments({**arguments, "run": name})
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", [name for name in HOSTILE if isinstance(name, str)], ids=repr)
def test_no_honest_submitter_sends_such_a_name(tmp_path, name):
    with pytest.raises(DeployError):
        write_job(tmp_path / "job", name, from_mapping({}))
    assert not (tmp_path / "job").exists()


@given(st.text(max_size=80))
@settings(suppress_health_check=list(HealthCheck), max_examples=50)
def test_every_run_folder_has_a_name_that_both_sides_take(arguments, name):
    run = read_arguments({**arguments, "run": file_safe_name(name)}).run
    for folder in (folder_of("/kit", run), runs_of("/kit") / run / "north"):
        assert folder.resolve().is_relative_to("/kit/runs")


def test_a_server_of_one_run_keeps_it_where_its_owner_says(monkeypatch):
    monkeypatch.setenv("SPLITFT_RUN_FOLDER", "/runs/my run.1")
    assert str(folder_of("/kit", "my-run-1~0123456789")) == "/runs/my run.1"
