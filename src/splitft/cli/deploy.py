"""Verbs of a federation on real machines: splitft deploy poc, provision, site, start, submit."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from splitft.cli.app import INTERRUPTED, AsJson, ConfigFile, Verb, app, console, end, tidy
from splitft.errors import DeployError, RunError

deploy = typer.Typer(
    help="The same run over NVIDIA FLARE: on this machine with real processes, or across organisations.",
    no_args_is_help=True,
)
app.add_typer(deploy, name="deploy")

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as training.rounds=5")
]
AdminKit = Annotated[Path, typer.Option("--kit", help="Admin's startup kit, as `provision` makes it.")]


def deployed(function: Verb) -> Verb:
    """Make a function a verb of `splitft deploy`, which says so where FLARE is not installed."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> None:
        if importlib.util.find_spec("nvflare") is None:
            raise DeployError("deployment needs NVIDIA FLARE: pip install 'splitft[deploy]'")
        function(*args, **kwargs)

    deploy.command()(tidy(checked))
    return function


@deployed
def poc(
    file: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder [default: runs/NAME-DATE-TIME]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run that is in --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Everything on this machine: real processes, real certificates, the run folder of `train`."""
    from splitft.cli.progress import Progress, client_table
    from splitft.cli.train import new_folder
    from splitft.config import load
    from splitft.deploy.flare.poc import run_poc
    from splitft.tracking.summary import headline

    if resume and out is None:
        raise RunError("--resume needs --out DIR, the run folder to continue")
    config, out, screen = load(file, overrides or []), out or new_folder(file.stem), console(stderr=as_json)

    def say(line: str) -> None:
        screen.print(line, markup=False, highlight=False, soft_wrap=True)

    try:
        with Progress(screen) as progress:
            run = run_poc(config, out, resume=resume, listeners=[progress], say=say)
    except KeyboardInterrupt:
        end(f"stopped; go on with: splitft deploy poc {file} --out {out} --resume", INTERRUPTED)
    if as_json:
        typer.echo(json.dumps(run.summary, indent=2))
        return
    screen.print()
    screen.print(client_table(run.summary))
    say(f"\n{headline(run.summary)}")
    say(f"Report   {run.folder / 'report.html'}")
    say(f"Adapter  {run.adapter_dir} (PEFT)")
    say(f"Logs     {run.folder / 'logs'}")


@deployed
def provision(
    file: ConfigFile,
    overrides: Overrides = None,
    to: Annotated[Path, typer.Option(help="Where to write the kits.")] = Path("kits"),
) -> None:
    """Certificates and a startup kit for the server, for each site, and for who submits runs."""
    from splitft.config import load
    from splitft.deploy.common import site_names
    from splitft.deploy.flare.provisioning import provision as make
    from splitft.deploy.site.policy import NAME, site_template

    config = load(file, overrides or [])
    kits = make(to, config.deploy.server, config.deploy.port, site_names(config))
    for site in kits.sites:
        (kits.of(site) / "local" / NAME).write_text(site_template(), encoding="utf-8")
    typer.echo(f"server   {kits.of(kits.server)}   for {kits.server}, port {config.deploy.port}")
    for site in kits.sites:
        typer.echo(f"site     {kits.of(site)}   for {site} alone: it holds its private key")
    typer.echo(f"admin    {kits.admin}   for who submits runs")
    typer.echo(f"Each data owner fills in local/{NAME} of its kit: its text, its machine, what may leave")
    typer.echo("On each machine: splitft deploy start KIT; then: splitft deploy submit FILE --kit ADMIN-KIT")


def site(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it, or what to check.")],
    check: Annotated[bool, typer.Option("--check", help="Check a file that is there.")] = False,
    run: Annotated[Path | None, typer.Option(help="With --check: a run to hold it against.")] = None,
) -> None:
    """A data owner's own file: write a commented one, or check one, alone or against a run."""
    from splitft.config import load
    from splitft.deploy.site.policy import load_site, refusals, site_template

    if not check:
        if run is not None:
            raise DeployError("--run is held against a file that is there; give --check too")
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


deploy.command()(tidy(site))


@deployed
def start(
    kit: Annotated[Path, typer.Argument(metavar="KIT", help="Startup kit of this machine's party.")],
) -> None:
    """Run this machine's party, and keep it running until Ctrl-C."""
    from splitft.deploy.flare.processes import CONSOLE, keep_running
    from splitft.deploy.flare.provisioning import party_of

    typer.echo(f"{party_of(kit)} is running; its log is {kit / CONSOLE}; Ctrl-C ends it")
    keep_running(kit)


@deployed
def submit(
    file: ConfigFile,
    kit: AdminKit,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to collect into [default: runs/NAME]")] = None,
) -> None:
    """Run a configuration on a running federation; stays to start the next link when sites come and go."""
    import tempfile

    from splitft.cli.progress import client_table
    from splitft.config import load
    from splitft.deploy.common import site_names
    from splitft.deploy.flare.admin import Console
    from splitft.deploy.flare.engine import FlareFederation
    from splitft.deploy.supervisor import supervise
    from splitft.run.folder import Run
    from splitft.tracking.summary import headline

    config, screen = load(file, overrides or []), console()
    out = out or Path("runs") / file.stem

    def say(line: str) -> None:
        screen.print(line, markup=False, highlight=False, soft_wrap=True)

    sites, spec = site_names(config), config.deploy
    try:
        with tempfile.TemporaryDirectory() as scratch, Console(kit) as line:
            federation = FlareFederation(line, out.name, config, Path(scratch), out, fetch=True)
            ending = supervise(federation, sites, spec.min_clients, spec.join_s, say, _rounds(say))
    except KeyboardInterrupt:
        end("the run goes on; follow it with `status`, end it with `stop`, go on with `submit`", INTERRUPTED)
    if ending.stopped:
        say(f"stopped after round {ending.rounds}; the same `submit` goes on from there")
        raise typer.Exit(INTERRUPTED)
    run = Run(out)
    screen.print(client_table(run.summary))
    say(f"\n{headline(run.summary)}\nRun folder  {run.folder}")


def _rounds(say: Callable[[str], None]) -> Callable[[str, Mapping[str, Any]], None]:
    """Say when another round is done."""
    seen: set[object] = set()

    def tell(link: str, status: Mapping[str, Any]) -> None:
        done = status.get("rounds_done")
        if done and done not in seen:
            seen.add(done)
            loss = status.get("eval_loss")
            said = f", held-out loss {loss:.3f}" if isinstance(loss, float) else ""
            say(f"round {done} of {status.get('rounds')} is done{said}")

    return tell
