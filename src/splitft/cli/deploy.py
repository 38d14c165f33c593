"""Verbs that set up and run a federation on real machines: splitft deploy poc, provision, ..., submit."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Mapping
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

AdminKit = Annotated[Path, typer.Option("--kit", help="Startup kit of the admin, as written by `provision`.")]


def deployed(function: Verb) -> Verb:
    """Register a function as a verb of `splitft deploy` that needs FLARE to be installed."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> None:
        if importlib.util.find_spec("nvflare") is None:
            raise DeployError("deployment needs NVIDIA FLARE: pip install 'splitft[deploy]'")
        function(*args, **kwargs)

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
    """Write startup kits with certificates for the server, each site, and the admin who submits runs."""
    from splitft.config import load
    from splitft.deploy.flare.provisioning import provision as write_kits
    from splitft.deploy.run_terms import site_names
    from splitft.deploy.site.policy import SITE_FILE, site_template

    config = load(file, overrides or [])
    kits = write_kits(to, config.deploy.server, config.deploy.port, site_names(config))
    for site in kits.sites:
        (kits.of(site) / "local" / SITE_FILE).write_text(site_template(), encoding="utf-8")
    typer.echo(f"server   {kits.of(kits.server)}   for {kits.server}, port {config.deploy.port}")
    for site in kits.sites:
        typer.echo(f"site     {kits.of(site)}   for {site} only: it contains its private key")
    typer.echo(f"admin    {kits.admin}   for whoever submits runs")
    typer.echo(
        f"Each data owner fills in local/{SITE_FILE} of its kit: its text, its machine, its limits on a run"
    )
    typer.echo("On each machine: splitft deploy start KIT; then: splitft deploy submit FILE --kit ADMIN-KIT")


def site(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write or to check.")],
    check: Annotated[bool, typer.Option("--check", help="Check an existing file.")] = False,
    run: Annotated[
        Path | None, typer.Option(help="With --check: configuration of a run to check against.")
    ] = None,
) -> None:
    """Write a data owner's commented site file, or check one, alone or against a run."""
    from splitft.config import load
    from splitft.deploy.site.policy import load_site, refusals, site_template

    if not check:
        if run is not None:
            raise DeployError("--run needs --check: it checks an existing file against a run")
        if file.exists():
            raise DeployError(f"{file} exists already; give another name, or --check it")
        file.write_text(site_template(), encoding="utf-8")
        typer.echo(f"wrote {file}; put it into local/ of the site's kit")
        return
    own = load_site(file)
    found = [] if run is None else refusals(own, load(run), None)
    if found:
        raise DeployError("this site would decline:\n" + "\n".join(found))
    typer.echo(
        f"{file} can be read" + ("" if run is None else f", and {run} asks for nothing that it forbids")
    )


deploy.command()(without_traceback(site))


@deployed
def start(
    kit: Annotated[
        Path, typer.Argument(metavar="KIT", help="Startup kit of the server or site on this machine.")
    ],
) -> None:
    """Run the server or site of this machine until Ctrl-C."""
    from splitft.deploy.flare.processes import CONSOLE, keep_running
    from splitft.deploy.flare.provisioning import party_of

    typer.echo(f"{party_of(kit)} is running; its log is {kit / CONSOLE}; Ctrl-C ends it")
    keep_running(kit)


@deployed
def submit(
    file: ConfigFile,
    kit: AdminKit,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder to collect into.", show_default="runs/NAME")
    ] = None,
) -> None:
    """Run a configuration on a running federation, and start new sessions when sites come and go."""
    import tempfile

    from splitft.config import load
    from splitft.deploy.flare.admin import Console
    from splitft.deploy.flare.engine import FlareEngine, FlareRun
    from splitft.deploy.run_terms import site_names
    from splitft.deploy.supervisor import supervise
    from splitft.run.folder import Run
    from splitft.tracking.summary import client_table, headline

    config, screen = load(file, overrides or []), console()
    out = out or Path("runs") / file.stem

    print_line = partial(say, screen)
    sites, spec = site_names(config), config.deploy
    try:
        with tempfile.TemporaryDirectory() as scratch, Console(kit) as admin:
            engine = FlareEngine(admin, FlareRun(out.name, config, Path(scratch), out, fetch=True))
            ending = supervise(
                engine, sites, spec.min_clients, spec.join_s, print_line, _round_printer(print_line)
            )
    except KeyboardInterrupt:
        end(
            "the run continues; `status` follows it, `stop` ends it, `submit` supervises it again",
            INTERRUPTED,
        )
    if ending.stopped:
        print_line(f"stopped after round {ending.rounds}; the same `submit` goes on from there")
        raise typer.Exit(INTERRUPTED)
    run = Run(out)
    screen.print(client_table(run.summary).to_rich())
    print_line(f"\n{headline(run.summary)}\nRun folder  {run.folder}")


def _round_printer(print_line: Callable[[str], None]) -> Callable[[str, Mapping[str, Any]], None]:
    """Return a listener of status that prints a line for each finished round."""
    seen: set[object] = set()

    def listener(session: str, status: Mapping[str, Any]) -> None:
        done = status.get("rounds_done")
        if done and done not in seen:
            seen.add(done)
            loss = status.get("eval_loss")
            text = f", held-out loss {loss:.3f}" if isinstance(loss, float) else ""
            print_line(f"round {done} of {status.get('rounds')} is done{text}")

    return listener
