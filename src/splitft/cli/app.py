"""What every verb has: the application it belongs to, how it ends, and the arguments that several share.

Exit status 0, or 2 with one clear message for what the user can mend, 130 on Ctrl-C with the last finished
round safe on disk, and 1 for a fault of ours (SPLITFT_DEBUG=1 shows where).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from splitft.errors import SplitftError

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it (128 + SIGINT)."""
UNUSABLE = 2
"""Exit status for what the user can mend."""
FAULT = 1
"""Exit status for what only we can mend."""

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
    """Make a function a verb of the command."""
    app.command()(tidy(function))
    return function


def tidy(function: Verb) -> Verb:
    """Let a function end with a message and an exit status, never with a traceback."""

    @functools.wraps(function)
    def ending(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except SplitftError as error:
            end(str(error), UNUSABLE)
        except KeyboardInterrupt:
            end("stopped", INTERRUPTED)
        except (typer.Exit, typer.BadParameter, BrokenPipeError):
            raise
        except OSError as error:
            end(f"{error.filename or 'the system'}: {error.strerror or error}", UNUSABLE)
        except Exception as error:
            text = f"unexpected {type(error).__name__}: {error}"
            end(f"{text}\nThis is a fault of splitft; SPLITFT_DEBUG=1 shows where it happened.", FAULT)

    return ending  # type: ignore[return-value]  # it takes and gives what the function does


def end(message: str, status: int) -> NoReturn:
    """Say why on stderr and leave; with SPLITFT_DEBUG, let the exception at hand through as it is."""
    if os.environ.get("SPLITFT_DEBUG"):
        raise  # called while an exception is handled
    typer.echo(f"splitft: {message}", err=True)
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
    """Take the options that stand before the verb."""


def console(stderr: bool = False) -> Console:
    """A console of rich, on stdout or stderr."""
    from rich.console import Console

    return Console(stderr=stderr)
