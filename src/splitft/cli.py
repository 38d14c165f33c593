"""The command line: every verb of splitft, and how each ends.

    splitft demo | init | train | plan | report | generate | export

Exit status 0, or 2 with one clear message for what the user can mend, 130 on Ctrl-C with the last finished
round safe on disk, and 1 for a fault of ours (SPLITFT_DEBUG=1 shows where). Heavy imports are inside the
verbs, so that `--help` is instant.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from splitft.errors import RunError, SplitftError

if TYPE_CHECKING:
    from rich.console import Console

    from splitft.assemble import Run
    from splitft.config import RunConfig

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it (128 + SIGINT)."""
UNUSABLE = 2
"""Exit status for what the user can mend."""
FAULT = 1
"""Exit status for what only we can mend."""

DEMO_PROMPT = "The with statement is used to"
"""What the demo lets the model continue before and after; a sentence that the text explains."""

app = typer.Typer(
    name="splitft",
    help="Federated split fine-tuning of language models: every client keeps its text and has its own cut.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
Verb = TypeVar("Verb", bound=Callable[..., None])

ConfigFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="Configuration, as `splitft init` writes it.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="DIR", help="Run folder, as `splitft train` leaves it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs.")]


def verb(function: Verb) -> Verb:
    """Make a function a verb that ends with a message and an exit status, never with a traceback."""

    @functools.wraps(function)
    def ending(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except SplitftError as error:
            _end(str(error), UNUSABLE)
        except KeyboardInterrupt:
            _end("stopped", INTERRUPTED)
        except (typer.Exit, typer.BadParameter, BrokenPipeError):
            raise
        except OSError as error:
            _end(f"{error.filename or 'the system'}: {error.strerror or error}", UNUSABLE)
        except Exception as error:
            text = f"unexpected {type(error).__name__}: {error}"
            _end(f"{text}\nThis is a fault of splitft; SPLITFT_DEBUG=1 shows where it happened.", FAULT)

    app.command()(ending)
    return function


def _end(message: str, status: int) -> NoReturn:
    """Say why on stderr and leave; with SPLITFT_DEBUG, let the exception at hand through as it is."""
    if os.environ.get("SPLITFT_DEBUG"):
        raise  # called while an exception is handled
    typer.echo(f"splitft: {message}", err=True)
    raise typer.Exit(status)


def _version(wanted: bool) -> None:
    if wanted:
        from splitft import __version__

        typer.echo(f"splitft {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options that stand before the verb."""


@verb
def demo(
    out: Annotated[Path | None, typer.Option(help="Run folder [default: runs/demo-DATE-TIME]")] = None,
    sample: Annotated[bool, typer.Option(help="Let the model continue a sentence before and after.")] = True,
) -> None:
    """Fine-tune a real model on real text across four clients with four cuts; about two minutes."""
    from splitft.config import from_mapping

    config = from_mapping(DEMO)
    run = _train(config, out or _new_folder("demo"), resume=False)
    if sample:
        from splitft.assemble import generate

        console = _console()
        console.print(f"\nThe model continues [bold]{DEMO_PROMPT} ...[/bold]")
        for when, adapter in (("before", False), ("after", True)):
            text = generate(run.folder, DEMO_PROMPT, max_new_tokens=30, adapter=adapter)
            console.print(f"  {when:<7}{' '.join(text.split())}", markup=False, highlight=False)


@verb
def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="Where to write it.")] = Path("run.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Write a commented configuration to start from."""
    from splitft.config import template

    if file.exists() and not force:
        raise RunError(f"{file} exists already; give another name, or --force")
    file.write_text(template(), encoding="utf-8")
    typer.echo(f"wrote {file}; train it with: splitft train {file}")


@verb
def train(
    file: ConfigFile,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as training.rounds=5")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder [default: runs/NAME-DATE-TIME]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run that is in --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train as the configuration says; leaves a run folder with adapter, summary and report."""
    from splitft.config import load

    if resume and out is None:
        raise RunError("--resume needs --out DIR, the run folder to continue")
    config = load(file, overrides or [])
    run = _train(config, out or _new_folder(file.stem), resume, quiet=as_json)
    if as_json:
        typer.echo(json.dumps(run.summary, indent=2))


@verb
def plan(
    file: ConfigFile,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as schedule.server=laptop")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict seconds, bytes and memory of every client at every cut; trains nothing."""
    from splitft.assemble import plan as planned
    from splitft.config import load
    from splitft.tracking.tables import choice_table, price_tables

    result = planned(load(file, overrides or []))
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=2))
        return
    console = _console()
    for heading, table in price_tables(result.to_json()):
        console.print(heading, highlight=False, markup=False, soft_wrap=True)
        console.print(table)
        console.print()
    console.print(choice_table(result.to_json()))


@verb
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="One or several run folders.")],
    to: Annotated[Path | None, typer.Option(help="HTML file [default: report.html in the first DIR]")] = None,
) -> None:
    """Write one self-contained HTML page about a run, or about several side by side."""
    from splitft.tracking.report import write_report

    typer.echo(write_report(folders, to or folders[0] / "report.html"))


@verb
def generate(
    folder: RunFolder,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation, in tokens.")] = 60,
    base: Annotated[bool, typer.Option("--base", help="Without the adapter, for comparison.")] = False,
) -> None:
    """Let the fine-tuned model continue a prompt."""
    from splitft.assemble import generate as continued

    typer.echo(prompt + continued(folder, prompt, max_new_tokens=max_new_tokens, adapter=not base))


@verb
def export(
    folder: RunFolder,
    to: Annotated[Path, typer.Option(help="Folder to write.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="The whole model with the adapter folded in, not the adapter.")
    ] = False,
) -> None:
    """Write the adapter as a PEFT folder, or the merged model."""
    from splitft.assemble import export as exported

    typer.echo(exported(folder, to, merged=merged))


DEMO: dict[str, Any] = {
    "data": {"max_tokens": 128, "eval_examples": 16},
    "clients": {"count": 4, "cuts": [2, 5, 10, 15], "shares": {"by": "length", "alpha": 0.5}},
    "lora": {"rank": 16, "rank_at_cut": 8},
    "training": {"rounds": 3, "steps": 10, "batch_size": 4, "lr": 1e-3},
}
"""The demo's configuration; what is not here has its default."""


def _train(config: RunConfig, out: Path, resume: bool, quiet: bool = False) -> Run:
    """Train with a progress display, and say at the end what came out."""
    import splitft.assemble as assemble
    from splitft.tracking.events import read_events
    from splitft.tracking.progress import Progress, client_table, verdict

    console = _console(stderr=quiet)
    try:
        with Progress(console) as progress:
            events = out / "events.jsonl"
            if resume and events.is_file():
                progress.remember(read_events(events))
            run = assemble.train(config, out, resume=resume, listeners=[progress])
    except KeyboardInterrupt:
        _end(_how_to_continue(out), INTERRUPTED)
    if not quiet:
        console.print()
        console.print(client_table(run.summary))
        console.print(f"\n{verdict(run.summary)}", highlight=False, soft_wrap=True)
        console.print(f"Report   {run.folder / 'report.html'}", highlight=False, soft_wrap=True)
        console.print(f"Adapter  {run.adapter_dir} (PEFT)", highlight=False, soft_wrap=True)
    return run


def _how_to_continue(out: Path) -> str:
    """What a stopped run has safe, and the command that goes on with it."""
    from splitft.runtime.checkpoint import latest

    if not (out / "config.yaml").is_file():
        return "stopped before the run began; nothing was written"
    number = latest(out)
    saved = f"round {number} is safe" if number else "no round is finished yet"
    command = shlex.join(["splitft", "train", str(out / "config.yaml"), "--out", str(out), "--resume"])
    return f"stopped; {saved}. Continue with: {command}"


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


def _new_folder(name: str) -> Path:
    """A run folder of this name and moment that is not there yet."""
    first = Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    return next(path for n in range(1000) if not (path := first if not n else Path(f"{first}-{n}")).exists())


def main() -> None:
    """Entry point of the command `splitft`."""
    app()
