"""Say who may do what at a site and at the server: FLARE's authorization file and class list, by kind of kit.

    submitter (lead)       submits runs; watches, stops and collects its own
    administrator          watches and stops any run, and shuts a site out; submits none
    anybody else           nothing

What is not in the table is refused, for every role: code in a job (`byoc`), commands that read files (`ls`,
`cat`, ...), commands that configure logging (FLARE takes any logging class, so they would run code), restart
and shutdown. A job may start one class of ours, by its full name, and none of FLARE's.

Conditions are FLARE's: `any`, `none`, `n:submitter` (only who submitted the job).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from splitft.errors import DeployError
from splitft.files import write_whole

SUBMITTER, ADMINISTRATOR = "lead", "org_admin"
"""FLARE's names of our two roles, as they stand in certificates."""
ROLES = ("project_admin", ADMINISTRATOR, SUBMITTER, "member")
"""All roles that FLARE has; `project_admin` and `member` may do nothing here."""
AUTHORIZATION, RESOURCES = "authorization.json", "resources.json"
JOB_CLASSES = {
    "server": ("splitft.deploy.flare.job.ServerJob",),
    "client": ("splitft.deploy.flare.job.SiteJob",),
}
"""Classes that a job may start, by kind of kit. Full names: a prefix would let a job call our functions."""
_OWN = "n:submitter"
_VIEW = ("check_status", "list_jobs", "get_job_meta", "report_version")
RIGHTS: dict[str, dict[str, str]] = {
    SUBMITTER: {
        **dict.fromkeys((*_VIEW, "submit_job"), "any"),
        **dict.fromkeys(
            ("app_command", "abort_job", "get_job_log", "download_job", "download_job_components"), _OWN
        ),
    },
    ADMINISTRATOR: {
        **dict.fromkeys(_VIEW, "any"),
        **dict.fromkeys(("app_command", "abort_job", "get_job_log"), "any"),
        **dict.fromkeys(("remove_client", "disable_client", "enable_client"), "any"),
    },
}
"""Rights of each role, at the server and at sites; whatever is missing is refused."""
_REFUSED = ("byoc", "shell_commands", "configure_job_log", "configure_site_log", "server-predeployed-flwr")
"""Rights written as `none`, so that whoever reads the file sees them."""


def authorization() -> dict[str, Any]:
    """Return the content of the authorization file."""
    permissions = {
        role: {
            **dict.fromkeys(_REFUSED, "none"),
            **({} if role in RIGHTS else {"submit_job": "none"}),
            **RIGHTS.get(role, {}),
        }
        for role in ROLES
    }
    return {"format_version": "1.0", "permissions": permissions}


def write_permissions(kit: Path, kind: str) -> None:
    """Write the authorization file and the class list into a kit of a `server` or `client`.

    Both are written anew before each start, so a kit never runs with wider ones. Raises DeployError if the
    kit's resources cannot be read.
    """
    local = kit / "local"
    write_whole(local / AUTHORIZATION, json.dumps(authorization(), indent=2))
    resources = read_resources(kit)
    resources["class_allow_list"] = list(JOB_CLASSES[kind])
    resources["class_list_enforcement_mode"] = "enforce"
    write_whole(local / RESOURCES, json.dumps(resources, indent=2))


def read_resources(kit: Path) -> dict[str, Any]:
    """Return the resources of a kit: its own, or FLARE's default. Raises DeployError if it has none."""
    local = kit / "local"
    path = local / RESOURCES
    if not path.is_file():
        path = local / f"{RESOURCES}.default"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DeployError(f"{path} cannot be read ({error}); is {kit} a whole startup kit?") from error
    return found
