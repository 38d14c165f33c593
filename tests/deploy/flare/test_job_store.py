"""Jobs that a dead server's process has left running are marked as ended when it starts again."""

from __future__ import annotations

import base64
import json

import pytest

from runs import settings_file
from splitft.config import load
from splitft.deploy.flare.job_arguments import digest_of, read_arguments, sent_config, write_job
from splitft.deploy.flare.job_store import settle_jobs
from splitft.errors import DeployError
from splitft.version import __version__

CONFIG = base64.b64encode(b"seed: 1").decode()
ARGUMENTS = {"run": "first", "link": "0" * 32, "config": CONFIG, "version": __version__}


def test_only_what_needs_a_process_is_marked(tmp_path):
    states = {"a": "RUNNING", "b": "DISPATCHED", "c": "SUBMITTED", "d": "FINISHED:COMPLETED"}
    for name, state in states.items():
        path = tmp_path / "storage" / "jobs" / name / "meta"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"status": state, "name": "first"}))
    (tmp_path / "storage" / "jobs" / "e").mkdir()
    (tmp_path / "storage" / "jobs" / "e" / "meta").write_text("half a fi")
    assert settle_jobs(tmp_path) == ["a", "b"]
    found = {name: json.loads((tmp_path / "storage/jobs" / name / "meta").read_text()) for name in states}
    assert {name: meta["status"] for name, meta in found.items()} == {
        "a": "FINISHED:ABNORMAL", "b": "FINISHED:ABNORMAL", "c": "SUBMITTED", "d": "FINISHED:COMPLETED"
    }  # fmt: skip
    assert all(meta["name"] == "first" for meta in found.values())


def test_another_version_is_said_with_both_numbers():
    read_arguments(ARGUMENTS).check_version("this site")
    old = read_arguments({key: value for key, value in ARGUMENTS.items() if key != "version"})
    old.check_version("this site")  # submitted by a version that did not say
    with pytest.raises(
        DeployError, match=rf"this site has splitft {__version__}, .* with 99.0; install the same"
    ):
        read_arguments({**ARGUMENTS, "version": "99.0"}).check_version("this site")


@pytest.mark.parametrize("odd", [{"rounds": "3"}, {"rounds": True}, {"restart": 1}, {"version": 1}, {"x": 1}])
def test_odd_arguments_are_refused(odd):
    with pytest.raises(DeployError, match=next(iter(odd))):
        read_arguments({**ARGUMENTS, **odd})


@pytest.mark.parametrize("key", ["run", "link", "config", "version"])
def test_a_secret_of_the_environment_that_flare_puts_into_an_argument_is_not_repeated(key):
    secret = "hf_abcDEF/0123="
    with pytest.raises(DeployError) as refused:
        read_arguments({**ARGUMENTS, key: secret}).check_version("this site")
    assert secret not in str(refused.value)


def test_what_is_written_is_what_is_read(tmp_path, tiny_llama):
    config = load(settings_file(tmp_path, tiny_llama), [])
    write_job(tmp_path / "job", "first", config, rounds=3, restart=True)
    server = json.loads((tmp_path / "job/app/config/config_fed_server.json").read_text())["workflows"][0]
    assert not set("{}$") & set("".join(map(str, server["args"].values())))  # FLARE puts variables there
    job = read_arguments(server["args"])
    assert (job.run, job.rounds, job.restart, job.version) == ("first", 3, True, __version__)
    assert job.digest == digest_of(sent_config(config))
