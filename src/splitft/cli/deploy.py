"""Verbs that set up and run a federation on real machines: splitft deploy poc, provision, ..., submit."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from splitft.cli.app import (
    INTERRUPTED,
    AsJson,
    ConfigFile,
    Out,
    Overrides,
    Resume,
    Verb,
    app,
    console,
    end,
    say,
    without_traceback,
)
from splitft.errors import DeployError, RunError

deploy = typer.Typer(
    help="Run a federation over NVIDIA FLARE, on this machine or across organizations.",
    no_args_is_help=True,
)
app.add_typer(deploy, name="deploy")

AdminKit = Annotated[
    Path,
    typer.Option("--kit", help="Startup kit of whoever submits runs; `status` and `stop` take an admin's."),
]
SiteKit = Annotated[Path, typer.Argument(metavar="KIT", help="Startup kit of the site on this machine.")]
PRIVATE = 0o077
"""Permissions that files written by these verbs do not get: kits hold keys, and runs tell of texts."""


def deployed(function: Verb) -> Verb:
    """Register a function as a verb of `splitft deploy` that needs FLARE to be installed."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> None:
        if importlib.util.find_spec("nvflare") is None:
            raise DeployError("deployment needs NVIDIA FLARE: pip install 'splitft[deploy]'")
        before = os.umask(PRIVATE)
        try:
            function(*args, **kwargs)
        finally:
            os.umask(before)

    deploy.command()(without_traceback(checked))
    return function


@deployed
def poc(
    file: ConfigFile,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Run server and sites as processes on this machine; the run folder is that of `train`."""
    from splitft.cli.progress import Progress, show_outcome
    from splitft.cli.train import new_folder
    from splitft.config import load
    from splitft.deploy.flare.poc import run_poc

    if resume and out is None:
        raise RunError("--resume needs --out DIR, the run folder to continue")
    config, out, screen = load(file, overrides or []), out or new_folder(file.stem), console(stderr=as_json)

    try:
        with Progress(screen) as progress:
            run = run_poc(config, out, resume=resume, listeners=[progress], say=partial(say, screen))
    except KeyboardInterrupt:
        end(f"stopped; continue with: splitft deploy poc {file} --out {out} --resume", INTERRUPTED)
    if as_json:
        typer.echo(json.dumps(run.summary, indent=2))
        return
    show_outcome(screen, run, f"Logs     {run.folder / 'logs'}")


@deployed
def provision(
    file: ConfigFile,
    overrides: Overrides = None,
    to: Annotated[Path, typer.Option(help="Folder to write the kits to.")] = Path("kits"),
) -> None:
    """Write the kits of all parties on this machine, to try things out; it has everybody's keys."""
    from splitft.config import load
    from splitft.deploy.flare.provisioning import AUTHORITY
    from splitft.deploy.flare.provisioning import provision as write_kits
    from splitft.deploy.run_terms import site_names
    from splitft.deploy.site.policy import SITE_FILE, site_template

    config = load(file, overrides or [])
    kits = write_kits(to, config.deploy.server, config.deploy.port, site_names(config))
    for site in kits.sites:
        (kits.of(site) / "local" / SITE_FILE).write_text(site_template(), encoding="utf-8")
    typer.echo(f"server     {kits.of(kits.server)}   for {kits.server}, port {config.deploy.port}")
    for site in kits.sites:
        typer.echo(f"site       {kits.of(site)}   for {site} only: it contains its private key")
    typer.echo(f"submitter  {kits.submitter}   for whoever submits and watches runs")
    typer.echo(f"admin      {kits.admin}   for whoever shuts sites out; it cannot submit")
    typer.echo(f"authority  {kits.folder / AUTHORITY}   admits new parties; keep it off the server")
    typer.echo(
        f"WARNING: {to} holds the private keys of all parties. Between organizations each makes its own: "
        "splitft deploy authority, request, approve, package"
    )
    typer.echo(
        f"Each data owner fills in local/{SITE_FILE} of its kit: its text, its machine, its limits on a run"
    )
    typer.echo(
        "On each machine: splitft deploy start KIT; then: splitft deploy submit FILE --kit SUBMITTER-KIT"
    )


@deployed
def start(
    kit: Annotated[
        Path, typer.Argument(metavar="KIT", help="Startup kit of the server or site on this machine.")
    ],
    paused: Annotated[
        bool, typer.Option("--pause", help="Connect, and take part in no run until `splitft deploy resume`.")
    ] = False,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Serve Prometheus metrics of the server's runs on 127.0.0.1 at this port."
        ),
    ] = None,
) -> None:
    """Run the server or site of this machine until Ctrl-C."""
    from splitft.deploy.flare.job import owner_folder
    from splitft.deploy.flare.processes import CONSOLE
    from splitft.deploy.flare.provisioning import party_of
    from splitft.deploy.flare.running import keep_running
    from splitft.deploy.site.pause import is_paused
    from splitft.deploy.site.pause import pause as pause_site

    if paused:
        pause_site(_owner_of_site(kit))
    name = party_of(kit)
    tell = partial(typer.echo)
    tell(f"{name} is running; its log is {kit / CONSOLE}; Ctrl-C ends it")
    if is_paused(owner_folder(str(kit))):
        tell(f"{name} is paused: it takes part in no run until: splitft deploy resume {kit}")
    keep_running(kit, tell, metrics_port)


@deployed
def pause(kit: SiteKit) -> None:
    """Take part in no run until `resume`; a run underway goes on without this site."""
    from splitft.deploy.site.pause import pause as pause_site

    pause_site(_owner_of_site(kit))
    typer.echo(f"paused; it stays connected and takes part in no run until: splitft deploy resume {kit}")


@deployed
def resume(kit: SiteKit) -> None:
    """Take part in runs again, from the next session on."""
    from splitft.deploy.site.pause import resume as resume_site

    was = resume_site(_owner_of_site(kit))
    typer.echo("resumed; it takes part from the next session on" if was else "it was not paused")


def _owner_of_site(kit: Path) -> Path:
    """Return the owner's folder of a site's kit; raise DeployError for any other kit."""
    from splitft.deploy.flare.job import owner_folder
    from splitft.deploy.flare.provisioning import kind_of

    if kind_of(kit) != "client":
        raise DeployError(f"{kit} is the server's kit; a data owner pauses its own site")
    return owner_folder(str(kit))
