"""Who may do what, asked of FLARE's own authorizer, deployer and component check."""

from __future__ import annotations

import io
import json
import zipfile

import pytest

pytest.importorskip("nvflare")

from nvflare.apis.fl_constant import AdminCommandNames, FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.fl_exception import UnsafeComponentError
from nvflare.apis.workspace import Workspace
from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST
from nvflare.app_common.widgets.component_path_authorizer import ComponentPathAuthorizer
from nvflare.fuel.sec.authz import AuthorizationService, AuthzContext, Person
from nvflare.private.admin_defs import Message
from nvflare.private.defs import RequestHeader, SysCommandTopic, TrainingTopic
from nvflare.private.fed.app.default_app_validator import DefaultAppValidator
from nvflare.private.fed.utils.app_authz import AppAuthzService
from nvflare.private.fed.utils.app_deployer import AppDeployer
from nvflare.private.privacy_manager import PrivacyManager, PrivacyService
from nvflare.security.security import COMMAND_CATEGORIES, FLAuthorizer

from splitft.deploy.flare.party import SITE_COMMANDS, CheckedProcessor, StrictAuthorizer
from splitft.deploy.flare.permissions import JOB_CLASSES, authorization, write_permissions

ADA, BOB = ("ada@a.org", "splitft"), ("bob@b.org", "splitft")
COMMANDS = sorted(
    {value for key, value in vars(AdminCommandNames).items() if key.isupper()}
    | set(COMMAND_CATEGORIES)
    | set(COMMAND_CATEGORIES.values())
    | {"byoc", "server-predeployed-flwr", "dead", "a command that FLARE adds one day"}
)
VIEW = {"check_status", "list_jobs", "get_job_meta", "report_version"}
OF_ANY_JOB = {"app_command", "abort_job", "get_job_log"}
OF_OWN_JOB = OF_ANY_JOB | {"download_job", "download_job_components"}
MAY = {
    ("lead", "own"): VIEW | {"submit_job"} | OF_OWN_JOB,
    ("lead", "other"): VIEW | {"submit_job"},
    ("org_admin", "other"): VIEW | OF_ANY_JOB | {"remove_client", "disable_client", "enable_client"},
}
"""The oracle: what each role may do to its own jobs and to those of others; everybody else nothing."""


@pytest.mark.parametrize("role", ["lead", "org_admin", "project_admin", "member", "super", ""])
@pytest.mark.parametrize("whose", ["own", "other"])
def test_every_command_of_flare_is_for_whom_the_table_says_and_refused_to_all_others(role, whose):
    authorizer = StrictAuthorizer("splitft", authorization())
    user, submitter = Person(*ADA, role), Person(*(ADA if whose == "own" else BOB), "lead")
    permitted = {
        command for command in COMMANDS if authorizer.authorize(AuthzContext(command, user, submitter))[0]
    }
    expected = MAY.get((role, whose), MAY.get((role, "other"), set()))
    assert permitted == expected


def test_flares_own_authorizer_reads_the_file_alike_and_lets_only_its_test_role_through():
    own, strict = FLAuthorizer("splitft", authorization()), StrictAuthorizer("splitft", authorization())
    for command in COMMANDS:
        for role in ("lead", "org_admin", "project_admin", "member"):
            asked = AuthzContext(command, Person(*ADA, role), Person(*BOB, "lead"))
            assert own.authorize(asked)[0] == strict.authorize(asked)[0]
    assert own.authorize(AuthzContext("byoc", Person(*ADA, "super")))[0]  # why ours is in its place


# --- code in a job --------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path):
    """A site's workspace with our permissions, and FLARE's services as its process has them."""
    local = tmp_path / "local"
    local.mkdir()
    (tmp_path / "startup").mkdir()
    (local / "resources.json.default").write_text(
        json.dumps({"class_allow_list": list(DEFAULT_CLASS_ALLOW_LIST), "components": []})
    )
    write_permissions(tmp_path, "client")
    before = AuthorizationService.the_authorizer, AppAuthzService.app_validator
    AuthorizationService.the_authorizer = StrictAuthorizer("splitft", authorization())
    AppAuthzService.initialize(DefaultAppValidator("client"))
    PrivacyService.initialize(PrivacyManager(scopes=None, default_scope_name=None, components=None))
    yield Workspace(str(tmp_path), "north", "config")
    AuthorizationService.the_authorizer, AppAuthzService.app_validator = before


def app(**files: str) -> bytes:
    """A job's app as it is sent to a site."""
    files = {"config/config_fed_client.json": '{"format_version": 2, "executors": []}', **files}
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


def deploy(site, data: bytes, role: str) -> str | None:
    meta = {"submitter_name": "ada@a.org", "submitter_org": "splitft", "submitter_role": role}
    return AppDeployer().deploy(site, "job", meta, "app", data, FLContext())


@pytest.mark.parametrize("role", ["lead", "org_admin", "project_admin", "super"])
@pytest.mark.hostile("a job brings code, submitted by role {role}", "refused at the site and deleted")
def test_a_job_that_brings_code_is_refused_whoever_submits_it_and_deleted(site, tmp_path, role):
    assert deploy(site, app(**{"custom/evil.py": "print('here')"}), role) == "BYOC not permitted"
    assert not list(tmp_path.rglob("evil.py"))


def test_a_job_without_code_is_deployed(site):
    assert deploy(site, app(), "lead") is None


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("splitft.deploy.flare.job.SiteJob", True),
        ("splitft.deploy.flare.job.ServerJob", False),
        ("splitft.deploy.flare.job.write_job", False),  # it deletes the folder that it is given
        ("splitft.deploy.flare.job.shutil.rmtree", False),
        ("splitft.deploy.flare.provisioning.provision", False),
        ("subprocess.Popen", False),
        ("nvflare.app_common.np.np_trainer.NPTrainer", False),  # of FLARE's own list
        ("nvflare.app_common.statistics.json_stats_file_persistor.JsonStatsFileWriter", False),
        ("nvflare.app_common.executors.client_api_launcher_executor.ClientAPILauncherExecutor", False),
    ],
)
@pytest.mark.hostile("a job names the class {path}", "only the class of a run is started")
def test_a_job_may_start_our_class_at_a_site_and_nothing_else(site, path, allowed):
    context = FLContext()
    context.set_prop(FLContextKey.WORKSPACE_OBJECT, site, private=True)
    check = ComponentPathAuthorizer()
    if allowed:
        check.authorize_component_config({"path": path, "args": {}}, fl_ctx=context)
        return
    with pytest.raises(UnsafeComponentError, match="not in allow_list"):
        check.authorize_component_config({"path": path, "args": {}}, fl_ctx=context)


@pytest.mark.hostile("the permissions in a kit are widened", "they are strict again at the next start")
def test_wider_permissions_in_a_kit_do_not_outlive_its_next_start(site, tmp_path):
    local = tmp_path / "local"
    wide = {"class_allow_list": ["*"], "class_list_enforcement_mode": "warn", "components": []}
    (local / "resources.json").write_text(json.dumps(wide))
    (local / "authorization.json").write_text(
        json.dumps({"format_version": "1.0", "permissions": {"lead": "any"}})
    )
    write_permissions(tmp_path, "client")
    resources = json.loads((local / "resources.json").read_text())
    assert resources["class_allow_list"] == list(JOB_CLASSES["client"])
    assert resources["class_list_enforcement_mode"] == "enforce"
    assert json.loads((local / "authorization.json").read_text()) == authorization()


# --- commands that a site obeys -------------------------------------------------------------------


@pytest.mark.hostile(
    "a server waives authorization and sends every command of FLARE",
    "a site obeys only those that a run needs",
)
def test_a_site_obeys_no_command_but_those_that_a_run_needs_even_if_the_server_waives_authorization():
    topics = {topic for kind in SITE_COMMANDS for topic in CheckedProcessor(kind()).get_topics()}
    assert topics == {
        TrainingTopic.DEPLOY, TrainingTopic.ABORT, TrainingTopic.CHECK_STATUS, TrainingTopic.START_JOB,
        TrainingTopic.NOTIFY_JOB_STATUS, TrainingTopic.CHECK_RESOURCE, TrainingTopic.CANCEL_RESOURCE,
        SysCommandTopic.REPORT_VERSION,
    }  # fmt: skip
    assert SysCommandTopic.SHELL not in topics
    assert TrainingTopic.CONFIGURE_JOB_LOG not in topics  # dictConfig may name any class


@pytest.mark.parametrize("job", ["../../escape", "..", "/tmp", "a" * 500, 7, "x\0y"])
@pytest.mark.hostile("a job id that is a path: {id}", "refused; no folder")
def test_what_is_no_job_id_never_becomes_a_folder(job):
    class Deletes:
        def process(self, req, app_ctx):
            raise AssertionError("the command was carried out")

    message = Message(topic=TrainingTopic.DEPLOY, body=b"")
    message.set_header(RequestHeader.JOB_ID, job)
    assert "no job id" in CheckedProcessor(Deletes()).process(message, None).body
