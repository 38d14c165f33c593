"""Verb that runs a configuration on a running federation: splitft deploy submit.

FILE, submitter's kit --supervise--> sessions of the run; what happens to them and their sites, a line each
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from splitft.cli.app import INTERRUPTED, ConfigFile, Overrides, console, end, say
from splitft.cli.deploy import AdminKit, deployed


@deployed
def submit(
    file: ConfigFile,
    kit: AdminKit,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder to collect into.", show_default="runs/NAME")
    ] = None,
    abort: Annotated[
        bool, typer.Option("--abort", help="End a session of this run that is running, then start one.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew; what the server has of this run is set aside.")
    ] = False,
) -> None:
    """Run a configuration on a running federation, and start new sessions when sites come and go.

    A session of this run that is running is followed. --out names the run, on the server too.
    """
    import tempfile

    from splitft.config import load
    from splitft.deploy.flare.admin import Console
    from splitft.deploy.flare.engine import FlareEngine, FlareRun
    from splitft.deploy.run_terms import site_names
    from splitft.deploy.supervisor import supervise
    from splitft.names import file_safe_name
    from splitft.run.folder import Run
    from splitft.tracking.summary import client_table, headline

    config, screen = load(file, overrides or []), console()
    out = out or Path("runs") / file.stem

    print_line = partial(say, screen)
    sites, spec = site_names(config), config.deploy
    try:
        with tempfile.TemporaryDirectory() as scratch, Console(kit) as admin:
            name = file_safe_name(out.resolve().name)
            engine = FlareEngine(
                admin, FlareRun(name, config, Path(scratch), out, fetch=True, restart=restart)
            )
            if abort and (session := engine.running(check=False)) is not None:
                print_line(f"ending the session that is running (job {session})")
                engine.stop(session)
            listener = _status_printer(print_line)
            ending = supervise(engine, sites, spec.min_clients, spec.join_s, print_line, listener)
    except KeyboardInterrupt:
        end(
            "the run continues; `status` follows it, `stop` ends it, the same `submit` follows it again",
            INTERRUPTED,
        )
    if ending.stopped:
        print_line(f"stopped after round {ending.rounds}; the same `submit` goes on from there")
        raise typer.Exit(INTERRUPTED)
    run = Run(out)
    screen.print(client_table(run.summary).to_rich())
    print_line(f"\n{headline(run.summary)}\nRun folder  {run.folder}")


def _status_printer(print_line: Callable[[str], None]) -> Callable[[str, Mapping[str, Any]], None]:
    """Return a listener of status that prints finished rounds, and what happens to sites and sessions."""
    rounds: set[object] = set()
    noted: dict[str, int] = {}
    refused: set[tuple[str, str]] = set()

    def listener(session: str, status: Mapping[str, Any]) -> None:
        for site, reason in status.get("refusals", {}).items():
            if (session, site) not in refused:
                refused.add((session, site))
                print_line(f"{site} did not take the job: {reason}")
        for number, text in status.get("notes", ()):
            if number > noted.get(session, 0):
                noted[session] = number
                print_line(text)
        done = status.get("rounds_done")
        if done and done not in rounds:
            rounds.add(done)
            loss = status.get("eval_loss")
            text = f", held-out loss {loss:.3f}" if isinstance(loss, float) else ""
            print_line(f"round {done} of {status.get('rounds')} is done{text}")

    return listener
