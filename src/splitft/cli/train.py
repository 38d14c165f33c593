"""Verbs that train: demo, init, train."""

from __future__ import annotations

import json
import shlex
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitft.cli.app import INTERRUPTED, AsJson, ConfigFile, Out, Overrides, Resume, console, end, say, verb
from splitft.errors import RunError

if TYPE_CHECKING:
    from splitft.config import RunConfig
    from splitft.run.folder import Run

DEMO_PROMPT = "The with statement is used to"
"""A prompt for the model before and after training; the text explains it."""


@verb
def demo(
    out: Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/demo-DATE-TIME")] = None,
    sample: Annotated[bool, typer.Option(help="Show how the model continues a sentence.")] = True,
) -> None:
    """Fine-tune a real model on real text across four clients with four cuts; one to two minutes."""
    from splitft.config import from_mapping

    config = from_mapping(DEMO)
    run = _train(config, out or new_folder("demo"), resume=False)
    if sample:
        from splitft.run.folder import generate

        screen = console()
        screen.print(f"\nThe model continues [bold]{DEMO_PROMPT} ...[/bold]")
        for when, adapter in (("before", False), ("after", True)):
            text = generate(run.folder, DEMO_PROMPT, max_new_tokens=30, adapter=adapter)
            say(screen, f"  {when:<7}{' '.join(text.split())}")


@verb
def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="File to write.")] = Path("run.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a commented configuration file to start from."""
    from splitft.config import template

    if file.exists() and not force:
        raise RunError(f"{file} exists already; give another name, or --force")
    file.write_text(template(), encoding="utf-8")
    typer.echo(f"wrote {file}; train it with: splitft train {file}")


@verb
def train(
    file: ConfigFile,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Train a configuration, and write a run folder with adapter, summary and report."""
    from splitft.config import load

    if resume and out is None:
        raise RunError("--resume needs --out DIR, the run folder to continue")
    config = load(file, overrides or [])
    run = _train(config, out or new_folder(file.stem), resume, quiet=as_json)
    if as_json:
        typer.echo(json.dumps(run.summary, indent=2))


DEMO: dict[str, Any] = {
    "data": {"max_tokens": 128, "eval_examples": 10},
    "clients": {"count": 4, "cuts": [2, 5, 10, 15], "shares": {"by": "length", "alpha": 0.5}},
    "lora": {"rank": 16, "rank_at_cut": 8},
    "training": {"rounds": 3, "steps": 6, "batch_size": 4, "lr": 2e-3},
}
"""The demo's configuration, apart from defaults: at most two minutes on two cores that lack bfloat16."""


def _train(config: RunConfig, out: Path, resume: bool, quiet: bool = False) -> Run:
    """Train with a progress display, and print the outcome."""
    from splitft.cli.progress import Progress, show_outcome
    from splitft.run.train import train
    from splitft.tracking.log import read_events

    screen = console(stderr=quiet)
    try:
        with Progress(screen) as progress:
            events = out / "events.jsonl"
            if resume and events.is_file():
                progress.remember(read_events(events))
            run = train(config, out, resume=resume, listeners=[progress])
    except KeyboardInterrupt:
        end(_how_to_continue(out), INTERRUPTED)
    if not quiet:
        show_outcome(screen, run)
    return run


def _how_to_continue(out: Path) -> str:
    """Return which rounds of a stopped run are safe, and the command that continues it."""
    from splitft.training.checkpoint import latest

    if not (out / "config.yaml").is_file():
        return "stopped before the run began; nothing was written"
    number = latest(out)
    saved = f"round {number} is safe" if number else "no round is finished yet"
    command = shlex.join(["splitft", "train", str(out / "config.yaml"), "--out", str(out), "--resume"])
    return f"stopped; {saved}. Continue with: {command}"


def new_folder(name: str) -> Path:
    """Return a path for a run folder, with this name and the time, that does not exist yet."""
    first = Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    return next(path for n in range(1000) if not (path := first if not n else Path(f"{first}-{n}")).exists())
