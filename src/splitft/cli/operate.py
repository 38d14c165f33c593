"""Verbs for whoever runs a federation, while it runs: splitft deploy status, logs, stop.

admin's kit --> the federation's server --> the newest job, unless another is named
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitft.cli.app import AsJson, console
from splitft.cli.deploy import AdminKit, deployed
from splitft.errors import DeployError

if TYPE_CHECKING:
    from rich.table import Table

    from splitft.deploy.flare.admin import Console

LOOK_EVERY_S = 2.0
Job = Annotated[str | None, typer.Option(help="Job of FLARE [default: the newest].")]
Status = Mapping[str, Any]


@deployed
def status(
    kit: AdminKit,
    job: Job = None,
    as_json: AsJson = False,
    once: Annotated[bool, typer.Option("--once", help="Print the table and leave.")] = False,
) -> None:
    """Sites, cuts, rounds, losses, throughput and last-heard times, live until Ctrl-C."""
    from rich.live import Live

    from splitft.deploy.flare.admin import Console

    with Console(kit) as line:
        now = _looked(line, job)
        if as_json:
            typer.echo(json.dumps(now, indent=2))
            return
        screen = console()
        if once or not screen.is_terminal:
            screen.print(_table(now))
            return
        with Live(_table(now), console=screen) as live:
            while True:
                time.sleep(LOOK_EVERY_S)
                try:
                    now = _looked(line, job)
                    live.update(_table(now))
                except DeployError as error:  # it may be back, and the last table says what was
                    live.update(_table({**now, "state": str(error)}))


@deployed
def logs(
    kit: AdminKit,
    job: Job = None,
    party: Annotated[str, typer.Option(help="`server`, a site, or `all`.")] = "server",
) -> None:
    """What a party has logged for a job, as far as the server has it."""
    from splitft.deploy.flare.admin import Console

    with Console(kit) as line:
        for name, text in line.logs(job or _newest(line), party).items():
            for row in text.splitlines():
                typer.echo(f"{name}: {row}")


@deployed
def stop(kit: AdminKit, job: Job = None) -> None:
    """End the running link; the last finished round stays on the server, and `submit` goes on from it."""
    from splitft.deploy.flare.admin import Console
    from splitft.deploy.flare.job import STOP

    with Console(kit) as line:
        running = job or _newest(line)
        if (state := line.state(running)).startswith("FINISHED"):
            raise DeployError(f"nothing runs: the job {running} is {state}")
        answer = line.ask(running, STOP) or {}
        if not answer.get("stopped"):  # it has not come so far, or does not answer
            line.abort(running)
        typer.echo(f"stopped {answer.get('run', 'the run')} (job {running})")


def _looked(line: Console, job: str | None) -> dict[str, Any]:
    """How it is now."""
    from splitft.deploy.flare.job import STATUS

    newest = job or _newest(line)
    state = line.state(newest)
    answer = (line.ask(newest, STATUS) or {}) if state == "RUNNING" else {}
    return {"job": newest, "state": state, "connected": sorted(line.connected()), **answer}


def _newest(line: Console) -> str:
    """The job submitted last."""
    jobs = line.jobs()
    if not jobs:
        raise DeployError("no run has been submitted to this federation")
    return str(jobs[0]["job_id"])


def _table(status: Status) -> Table:
    """What is known, a row a site."""
    from rich.table import Table

    loss, sites = status.get("eval_loss"), status.get("sites", ())
    title = (
        f"{status.get('run', status['job'])}: round {status.get('round', 0)} of {status.get('rounds', '?')}"
    )
    title += f", held-out loss {loss:.3f}" if isinstance(loss, float) else ""
    together = sum(site["tokens_per_s"] for site in sites)
    known = {"RUNNING": f"{together:.0f} tokens/s in all"}
    table = Table(title=title, caption=known.get(status["state"], status["state"]))
    for heading in ("site", "connected", "state", "cut", "steps", "loss", "held out", "tokens/s", "heard"):
        table.add_column(heading, justify="left" if heading in ("site", "state") else "right")
    for site in sites:
        heard = site["heard_s_ago"]
        table.add_row(
            site["name"],
            "yes" if site["name"] in status["connected"] else "no",
            site["state"],
            *("-" if site[key] is None else str(site[key]) for key in ("cut", "steps")),
            *("-" if site[key] is None else f"{site[key]:.3f}" for key in ("loss", "held_out")),
            f"{site['tokens_per_s']:.0f}",
            "-" if heard is None else f"{heard:.0f} s ago",
        )
    for name in () if sites else status["connected"]:
        table.add_row(name, "yes", *("-",) * 7)
    return table
