"""A site is sovereign: what a hostile submitter and a hostile server ask of it, over FLARE, real processes.

The server is FLARE's own, without our limits: it lets everybody do everything. What is refused here, the site
refuses.
One to two minutes, so it runs only where SPLITFT_SLOW=1 asks for it.
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
import time
from pathlib import Path

import pytest

from runs import settings_file
from splitft.cli.operate import _status
from splitft.config import load
from splitft.deploy.flare import poc, processes
from splitft.deploy.flare.admin import Console
from splitft.deploy.flare.job import owner_folder
from splitft.deploy.flare.job_arguments import write_job
from splitft.deploy.flare.poc import Poc, run_poc
from splitft.deploy.identity import certificates
from splitft.deploy.site.pause import pause
from splitft.errors import DeployError
from splitft.tracking.log import read_events

pytest.importorskip("nvflare")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("SPLITFT_SLOW"), reason="minutes: SPLITFT_SLOW=1 runs it"),
]
LAX = Path(__file__).parent / "lax_server"
SITE = "north"
CONFIG = base64.b64encode(b"seed: 1").decode()
OURS = "splitft.deploy.flare.job"
EVIL = """
from pathlib import Path
from nvflare.apis.executor import Executor

class Evil(Executor):
    def __init__(self):
        super().__init__()
        Path({marker!r}).touch()

    def execute(self, *args):
        return None
"""


class Held:
    """A federation with a lax server, and a submitter who means no good."""

    def __init__(self, folder):
        self.folder = folder
        self.poc = Poc(folder, [SITE], folder / "runs")
        self.site = self.poc.kits.of(SITE)

    def start(self, patch):
        """Start the server without our limits, then the site with them."""
        server = self.poc.server
        everything = {"format_version": "1.0", "permissions": {"lead": "any", "org_admin": "any"}}
        (server.kit / "local" / "authorization.json").write_text(json.dumps(everything))
        resources = json.loads((server.kit / "local" / "resources.json").read_text())
        resources["class_allow_list"] = ["*"]
        (server.kit / "local" / "resources.json").write_text(json.dumps(resources))
        server.environment["PYTHONPATH"] = os.pathsep.join([str(LAX), os.environ.get("PYTHONPATH", "")])
        with patch.context() as only_here:
            only_here.setattr(processes, "_PARTY", "lax_party")
            server.start()
        start = server.start
        patch.setattr(server, "start", lambda: None)
        self.console = Console(self.poc.kits.submitter)
        self.poc.start(self.console)
        patch.setattr(server, "start", start)

    def job(self, executor, arguments=None, **files) -> Path:
        """A job folder that starts this class at the site; the server's side only sends its task."""
        folder = Path(tempfile.mkdtemp(dir=self.folder)) / "evil"
        content = {
            "meta.json": {
                "name": "evil", "resource_spec": {}, "deploy_map": {"app": ["@ALL"]}, "min_clients": 1,
            },
            "app/config/config_fed_server.json": {
                "format_version": 2, "components": [], "workflows": [{"id": "w", "path": "waiting.Waiting"}],
            },
            "app/config/config_fed_client.json": {
                "format_version": 2, "components": [],
                "executors": [{"tasks": ["*"], "executor": {"path": executor, "args": arguments or {}}}],
            },
        }  # fmt: skip
        for name, value in {**{k: json.dumps(v) for k, v in content.items()}, **files}.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(value)
        return folder

    def outcome(self, job: Path, seconds=60) -> tuple[str, str]:
        """The end of a submitted job, and what the site and the server say of it."""
        number = self.number = self.console.submit(job)
        until = time.monotonic() + seconds
        while not (state := self.console.state(number)).startswith("FINISHED") and time.monotonic() < until:
            time.sleep(0.5)
        return state, self.said(number)

    def await_site(self, seconds=60):
        """Wait until the site is connected."""
        until = time.monotonic() + seconds
        while SITE not in self.console.connected() and time.monotonic() < until:
            time.sleep(0.5)

    def logs(self, number: str) -> list[Path]:
        """The logs of a job, at both sides."""
        return [log for service in self.poc.services for log in service.kit.glob(f"{number}/*log*.txt")]

    def said(self, number: str) -> str:
        texts = [(service.kit / processes.CONSOLE).read_text() for service in self.poc.services]
        texts += [
            log.read_text() for service in self.poc.services for log in service.kit.glob(f"{number}/log*.txt")
        ]
        return "\n".join(texts)


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sovereign")
    with pytest.MonkeyPatch.context() as patch:
        made = Held(folder)
        try:
            made.start(patch)
            yield made
        finally:
            made.console.close()
            made.poc.stop()


@pytest.mark.hostile("a job with code of its own, over FLARE", "refused by the site; never runs")
def test_code_in_a_job_is_refused_by_the_site_and_never_runs(held):
    marker = held.folder / "evil-ran"
    job = held.job("evil.Evil", **{"app/custom/evil.py": EVIL.format(marker=str(marker))})
    state, said = held.outcome(job)
    assert not state.startswith("FINISHED:COMPLETED"), state
    assert "BYOC not permitted" in said
    assert not list(held.site.rglob("evil.py"))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("path", "arguments"),
    [
        ("subprocess.Popen", {"args": ["touch", "{marker}"]}),
        ("nvflare.app_common.np.np_trainer.NPTrainer", {}),
        (f"{OURS}.write_job", {"folder": "{victim}", "run": "x", "config": "x"}),
    ],
)
@pytest.mark.hostile("a job with the component {path}, over FLARE", "refused by the site")
def test_a_class_that_a_run_does_not_need_is_refused_by_the_site(held, path, arguments):
    marker, victim = held.folder / "foreign-ran", held.folder / "victim"
    victim.mkdir(exist_ok=True)
    (victim / "notes.txt").write_text("hers")
    text = json.dumps(arguments).replace("{marker}", str(marker)).replace("{victim}", str(victim))
    state, said = held.outcome(held.job(path, json.loads(text)))
    assert not state.startswith("FINISHED:COMPLETED"), state
    assert f"Component '{path}'" in said
    assert "is not in allow_list" in said
    assert not marker.exists()
    assert (victim / "notes.txt").read_text() == "hers"


@pytest.mark.hostile(
    "the administrator reads files of a site by FLARE's shell commands", "no command is answered"
)
def test_no_command_reads_a_file_of_the_site_even_if_the_server_allows_it(held):
    secret = held.site / "local" / "secret.txt"
    secret.write_text("a patient's name\n")
    commands = [
        f"ls {SITE} local", f"cat {SITE} local/secret.txt", f"tail {SITE} local/secret.txt",
        f"head {SITE} local/secret.txt", f'grep {SITE} "a" local/secret.txt', f"pwd {SITE}",
        f"report_env {SITE}", f"sys_info client {SITE}", f'configure_site_log client {SITE} "DEBUG"',
    ]  # fmt: skip
    session = held.console
    for command in commands:
        answer = json.dumps(session._do(lambda flare, c=command: flare.api.do_command(c)), default=str)
        assert "patient" not in answer, command
        assert "secret.txt" not in answer.replace(command.split(" ", 2)[-1], ""), command
        assert str(held.site) not in answer, command
        assert "invalid_request" in answer, (command, answer)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"run": "x", "link": "zz", "config": CONFIG}, "is no session key"),
        ({"run": 5, "link": "0" * 32, "config": CONFIG}, "not text"),
        ({"run": "../../escape", "link": "0" * 32, "config": CONFIG}, "1 to 64 letters"),
        ({"run": "x", "link": "0" * 32, "config": base64.b64encode(b"[1").decode()}, "configuration"),
    ],
)
@pytest.mark.hostile(
    "a job starts our class with odd arguments ({id})", "a clean refusal; nothing outside the kit"
)
def test_our_class_with_odd_arguments_ends_in_a_clean_refusal(held, tmp_path, arguments, words):
    folder = held.job(f"{OURS}.SiteJob", arguments)
    server = {"id": "splitft", "path": f"{OURS}.ServerJob", "args": arguments}
    (folder / "app/config/config_fed_server.json").write_text(
        json.dumps({"format_version": 2, "workflows": [server], "components": []})
    )
    state, _ = held.outcome(folder)
    assert state.startswith("FINISHED")
    assert "COMPLETED" not in state
    result = held.console.result(held.number, tmp_path)  # what whoever submitted it is told
    assert words in "".join(path.read_text() for path in result.rglob("ending.json"))
    logs = [*held.logs(held.number), *result.rglob("*log*.txt")]
    assert logs
    assert not [log for log in logs if "Traceback" in log.read_text()]
    assert not list(held.folder.rglob("escape"))


@pytest.mark.hostile("a job's arguments name variables of the site's environment", "they are not told")
def test_a_job_cannot_make_a_site_tell_its_environment(held):
    secret = "patient-zero/1"
    held.poc.sites[SITE].environment["SPLITFT_TEST_SECRET"] = secret
    held.poc.sites[SITE].stop()
    held.poc.sites[SITE].start()
    held.await_site()
    for key in ("run", "config", "version"):
        arguments = {"run": "x", "link": "0" * 32, "config": CONFIG, key: "{$SPLITFT_TEST_SECRET}"}
        held.outcome(held.job(f"{OURS}.SiteJob", arguments))
    for path in held.poc.server.kit.rglob("*.txt"):
        assert secret not in path.read_text(errors="replace"), path


def test_status_warns_of_certificates_that_end(held, monkeypatch):
    assert _status(held.console, None)["warnings"] == []
    monkeypatch.setattr(certificates, "WARN_DAYS", 400)
    now = _status(held.console, None)
    assert "the certificate of submitter@splitft.local ends in" in now["warnings"][0]
    assert "splitft deploy renew" in now["warnings"][0]


@pytest.mark.hostile("an administrator submits a run", "refused: another role submits")
def test_an_administrator_cannot_submit_to_a_server_of_ours(tmp_path):
    federation = Poc(tmp_path, [SITE], tmp_path / "runs")
    job = write_job(tmp_path / "job", "x", load(settings_file(tmp_path, tmp_path), []))
    with Console(federation.kits.admin) as admin:
        try:
            federation.start(admin)
            with pytest.raises(DeployError, match="may not do this"):
                admin.submit(job)
            assert admin.jobs() == []
        finally:
            federation.stop()


@pytest.mark.parametrize("when", ["before the session", "in the middle of a round"])
@pytest.mark.fault("an owner pauses a site {when}", "it stays out; the others go on")
def test_a_paused_site_stays_out_and_the_others_go_on(tmp_path, tiny_llama, monkeypatch, when):
    start, paused = poc.Poc.start, []

    def with_a_pause(self, console):
        paused.append(owner_folder(str(self.kits.of("client-2"))))
        if when == "before the session":
            pause(paused[0])
        start(self, console)

    def listener(event):
        if event.event == "StepDone" and event.client == "client-2" and event.step == 1:
            pause(paused[0])

    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.setattr(poc.Poc, "start", with_a_pause)
    file = settings_file(tmp_path, tiny_llama, training={"rounds": 2, "steps": 60}, deploy={"min_clients": 1})
    ended = run_poc(load(file, []), tmp_path / "run", listeners=[listener])
    events = read_events(ended.folder / "events.jsonl")
    declined = {e.site: e.reason for e in events if e.event == "SiteChanged" and e.state == "declined"}
    assert declined == {"client-2": "paused by its owner"}
    assert [e.participants for e in events if e.event == "RoundDone"] == [("client-1", "client-3")] * 2
    assert ended.summary["finished"]
    steps = [event for event in events if event.event == "StepDone" and event.client == "client-2"]
    assert len(steps) < 60 if when != "before the session" else not steps
