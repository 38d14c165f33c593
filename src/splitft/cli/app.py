"""The application, how its verbs end, and the arguments that several verbs share.

Exit status: 0 on success; 2, with one message, for an error that the user can fix; 130 on Ctrl-C, with the
last finished round on disk; 1 for a bug in splitft (SPLITFT_DEBUG=1 shows the traceback).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from splitft.errors import SplitftError
from splitft.foreign_text import printable_lines

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells: 128 + SIGINT."""
USER_ERROR = 2
"""Exit status for errors that the user can fix."""
BUG = 1
"""Exit status for bugs in splitft."""

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
    Path, typer.Argument(metavar="FILE", help="Configuration file; `splitft init` writes one.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="DIR", help="Run folder, as written by `splitft train`.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as training.rounds=5")
]
Out = Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/NAME-DATE-TIME")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run that is in --out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs.")]


def verb(function: Verb) -> Verb:
    """Register a function as a verb of the command."""
    app.command()(without_traceback(function))
    return function


def without_traceback(function: Verb) -> Verb:
    """Wrap a function so that it ends with a message and an exit status, never with a traceback."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except SplitftError as error:
            end(str(error), USER_ERROR)
        except KeyboardInterrupt:
            end("stopped", INTERRUPTED)
        except (typer.Exit, typer.BadParameter, BrokenPipeError):
            raise
        except OSError as error:
            end(f"{error.filename or 'the system'}: {error.strerror or error}", USER_ERROR)
        except Exception as error:
            text = f"unexpected {type(error).__name__}: {error}"
            end(f"{text}\nThis is a bug in splitft; SPLITFT_DEBUG=1 shows where it happened.", BUG)

    return wrapped  # type: ignore[return-value]  # it has the signature of the function


def end(message: str, status: int) -> NoReturn:
    """Print a message to stderr and exit; with SPLITFT_DEBUG, raise the exception being handled instead."""
    if os.environ.get("SPLITFT_DEBUG"):
        raise
    typer.echo(f"splitft: {printable_lines(message)}", err=True)
    raise typer.Exit(status)


def _version(wanted: bool) -> None:
    if wanted:
        from splitft.version import __version__

        typer.echo(f"splitft {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Accept the options before the verb."""


def console(stderr: bool = False) -> Console:
    """Return a console of rich on stdout or stderr."""
    from rich.console import Console

    return Console(stderr=stderr)


def say(screen: Console, *lines: str) -> None:
    """Print lines as they are: no markup, no colors, and no line breaks of our own."""
    for line in lines:
        screen.print(printable_lines(line), markup=False, highlight=False, soft_wrap=True)
