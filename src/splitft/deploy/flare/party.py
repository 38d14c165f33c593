"""Run FLARE's process of a kit with fewer powers than FLARE gives it.

    python -m splitft.deploy.flare.party server | client  <FLARE's own arguments>

FLARE's client obeys its server: a command is checked against the site's authorization file only if the
server asks for that, and a role named `super` may do anything. Here a site knows only the commands that a
run needs, so no server can make it read a file, configure its logging or stop; job ids are checked before
they become paths; and `super` is nobody. The server in turn has no shell commands. FLARE has no settings
for these, so its lists are shortened before its own main function runs. `connections` adds what is said
about connections.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from nvflare.apis.job_def import is_valid_job_id
from nvflare.fuel.f3.mpm import MainProcessMonitor
from nvflare.fuel.sec.authz import AuthorizationService
from nvflare.private.admin_defs import error_reply
from nvflare.private.defs import RequestHeader
from nvflare.private.fed.app.utils import version_check
from nvflare.private.fed.client import client_req_processors, scheduler_cmds, training_cmds
from nvflare.private.fed.client.admin import RequestProcessor
from nvflare.private.fed.server import server_cmd_modules
from nvflare.security.security import FLAuthorizer

from splitft.deploy.flare.connections import watch_client, watch_server
from splitft.deploy.flare.permissions import AUTHORIZATION
from splitft.deploy.identity.authority import PROJECT

MODULES = {"server": "server.server_train", "client": "client.client_train"}
"""FLARE's modules by kind of kit."""
SITE_COMMANDS = (
    training_cmds.DeployProcessor,
    training_cmds.AbortAppProcessor,
    training_cmds.ClientStatusProcessor,
    training_cmds.NotifyJobStatusProcessor,
    scheduler_cmds.CheckResourceProcessor,
    scheduler_cmds.CancelResourceProcessor,
    scheduler_cmds.StartJobProcessor,
    scheduler_cmds.ReportVersionProcessor,
)
"""Commands that a site obeys: what it takes to start, watch and abort a job."""
SERVER_COMMANDS = ("SystemCommandModule", "TrainingCommandModule", "JobCommandModule")
"""FLARE's modules of commands that the server has; who may use which is in the authorization file."""


class StrictAuthorizer(FLAuthorizer):
    """FLARE's authorizer without its role `super`, which may do everything."""

    def authorize(self, ctx: Any) -> tuple[bool, str]:
        """Return whether the authorization file permits it, and otherwise why not."""
        if ctx is None or "super" in (ctx.user.role, ctx.submitter.role):
            return False, "nobody has this role"
        permitted, reason = super().authorize(ctx)
        return permitted, reason


class CheckedProcessor(RequestProcessor):
    """A command of a site that is only carried out if its job id is one: ids become folders."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def get_topics(self) -> list[str]:
        """Return the topics of the command."""
        topics: list[str] = self._inner.get_topics()
        return topics

    def process(self, req: Any, app_ctx: Any) -> Any:
        """Carry out the command, or answer with an error."""
        job = req.get_header(RequestHeader.JOB_ID)
        if job not in (None, "") and not is_valid_job_id(job):
            return error_reply(f"{str(job)[:80]!r} is no job id")
        return self._inner.process(req, app_ctx)


def restrict(kit: Path) -> None:
    """Shorten FLARE's lists of commands, and take the authorization file of a kit as the only law.

    Raises OSError or ValueError if that file cannot be read: no process runs without it.
    """
    client_req_processors.ClientRequestProcessors.request_processors[:] = [
        CheckedProcessor(kind()) for kind in SITE_COMMANDS
    ]
    modules = server_cmd_modules.ServerCommandModules.cmd_modules
    modules[:] = [one for one in modules if type(one).__name__ in SERVER_COMMANDS]
    policy = json.loads((kit / "local" / AUTHORIZATION).read_text(encoding="utf-8"))
    AuthorizationService.initialize(StrictAuthorizer(PROJECT, policy))


def main() -> None:
    """Run the process."""
    kind = sys.argv.pop(1)
    module = importlib.import_module(f"nvflare.private.fed.app.{MODULES[kind]}")
    version_check()
    arguments = module.parse_arguments()
    kit = Path(arguments.workspace)
    restrict(kit)
    if kind == "server":
        watch_server(kit)
    else:
        watch_client(kit)
    sys.exit(MainProcessMonitor.run(main_func=module.main, run_dir=arguments.workspace, args=arguments))


if __name__ == "__main__":
    main()
