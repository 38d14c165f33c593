"""Verbs for the admin of a running federation: splitft deploy status, logs, stop.

admin's kit --> the federation's server --> the newest job, unless another is named
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitft.cli.app import AsJson, console
from splitft.cli.deploy import AdminKit, deployed
from splitft.errors import DeployError
from splitft.foreign_text import printable_lines

if TYPE_CHECKING:
    from rich.console import Group

    from splitft.deploy.flare.admin import Console

POLL_S = 2.0
NOTES = 5
"""Messages of the session that are shown below the table."""
Job = Annotated[str | None, typer.Option(help="FLARE job.", show_default="the newest")]
Status = Mapping[str, Any]


@deployed
def status(
    kit: AdminKit,
    job: Job = None,
    as_json: AsJson = False,
    once: Annotated[bool, typer.Option("--once", help="Print the table once.")] = False,
) -> None:
    """Show sites, cuts, rounds, losses, throughput and last heartbeats, live until Ctrl-C."""
    from rich.live import Live

    from splitft.deploy.flare.admin import Console

    with Console(kit) as admin:
        now = _status(admin, job)
        if as_json:
            typer.echo(json.dumps(now, indent=2))
            return
        screen = console()
        if once or not screen.is_terminal:
            screen.print(_show(now))
            return
        with Live(_show(now), console=screen) as live:
            while True:
                time.sleep(POLL_S)
                try:
                    now = _status(admin, job)
                    live.update(_show(now))
                except DeployError as error:  # the server may come back; show its last status
                    live.update(_show({**now, "state": str(error)}))


@deployed
def logs(
    kit: AdminKit,
    job: Job = None,
    party: Annotated[str, typer.Option(help="server, a site, or all.")] = "server",
) -> None:
    """Print the log of the server or of a site, as far as the server has it."""
    from splitft.deploy.flare.admin import Console

    with Console(kit) as admin:
        for name, text in admin.logs(job or _newest(admin), party).items():
            for row in text.splitlines():
                typer.echo(printable_lines(f"{name}: {row}"))


@deployed
def stop(kit: AdminKit, job: Job = None) -> None:
    """Stop the running session; the server keeps the last finished round, from which `submit` continues."""
    from splitft.deploy.flare.admin import Console, NotRunningError
    from splitft.deploy.flare.job import STOP

    with Console(kit) as admin:
        running = job or _newest(admin)
        if (state := admin.state(running)).startswith("FINISHED"):
            raise DeployError(f"nothing runs: the job {running} is {state}")
        answer: dict[str, Any] = {}
        with contextlib.suppress(NotRunningError):
            answer = admin.ask(running, STOP) or {}
        if not answer.get("stopped"):  # it has not started yet, or does not answer
            admin.abort(running)
        typer.echo(f"stopped {answer.get('run', 'the run')} (job {running})")


def _status(admin: Console, job: str | None) -> dict[str, Any]:
    """Return the state of a job, of its sites while it runs, and what there is to warn of."""
    from splitft.deploy.alerts import alerts
    from splitft.deploy.flare.admin import NotRunningError
    from splitft.deploy.flare.job import STATUS
    from splitft.deploy.identity.certificates import certificate_of, root_of, warnings_of, warnings_of_peers

    newest = job or _newest(admin)
    state = admin.state(newest)
    answer: dict[str, Any] = {}
    if state == "RUNNING":
        try:
            answer = admin.ask(newest, STATUS) or {}
        except NotRunningError:
            state = "RUNNING, but without a process: it is starting, has just ended, or died with the server"
    own = (certificate_of(admin.kit), root_of(admin.kit))
    warnings = [*warnings_of(own), *warnings_of_peers(answer.get("certificates"))]
    known = {"job": newest, "state": state, "connected": sorted(admin.connected())}
    return {**known, **answer, "warnings": [*warnings, *alerts(answer)]}


def _newest(admin: Console) -> str:
    """Return the id of the job submitted last; raise DeployError without one."""
    jobs = admin.jobs()
    if not jobs:
        raise DeployError("no run has been submitted to this federation")
    return str(jobs[0]["job_id"])


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"


def _show(status: Status) -> Group:
    """Return the run's state and a row for each site, as rich prints them."""
    from rich.console import Group
    from rich.text import Text

    from splitft.tracking.table import Table

    loss, sites = status.get("eval_loss"), status.get("sites", ())
    title = (
        f"{status.get('run', status['job'])}: round {status.get('round', 0)} of {status.get('rounds', '?')}"
    )
    title += f", held-out loss {loss:.3f}" if isinstance(loss, float) else ""
    right = status.get("eval_accuracy")
    title += f", token accuracy {100 * right:.1f} %" if isinstance(right, float) else ""
    total = sum(site["tokens_per_s"] for site in sites)
    state = f"{total:.0f} tokens/s in all" if status["state"] == "RUNNING" else status["state"]
    rows = [
        (
            site["name"],
            "yes" if site["name"] in status["connected"] else "no",
            site["state"],
            *("-" if site[key] is None else str(site[key]) for key in ("cut", "steps")),
            "not reported" if site["loss"] is None and site["steps"] else _loss(site["loss"]),
            _loss(site["held_out"]),
            f"{site['tokens_per_s']:.0f}",
            "-" if site["heard_s_ago"] is None else f"{site['heard_s_ago']:.0f} s ago",
        )
        for site in sites
    ] or [(name, "yes", *("-",) * 7) for name in status["connected"]]
    headings = ("site", "connected", "state", "cut", "steps", "loss", "held out", "tokens/s", "heard")
    lines = [Text(text) for _, text in status.get("notes", ())[-NOTES:]]
    lines += [Text(f"warning: {line}") for line in status.get("warnings", ())]
    return Group(Text(title), Table(headings, rows, "lrlrrrrrr").to_rich(), Text(state), *lines)
