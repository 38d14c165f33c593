"""The command line: every verb of splitft, and how each ends.

    splitft demo | init | train | report | generate | export

Exit status 0, or 2 with one clear message for what the user can mend, 130 on Ctrl-C with the last
finished round safe on disk, and 1 for a fault of ours (`splitft --debug VERB ...` shows where). Heavy
imports are inside the verbs, so that `--help` is instant.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from typer.core import TyperGroup

from splitft.errors import ConfigError, RunError, SplitftError

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


class _Verbs(TyperGroup):
    """Runs a verb and turns what it raises into one message and an exit status, never a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SplitftError as error:
            _end(ctx, str(error), UNUSABLE)
        except KeyboardInterrupt:
            _end(ctx, "stopped; finished rounds are safe, continue with --resume", INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except OSError as error:
            _end(ctx, f"{error.filename or 'the system'}: {error.strerror or error}", UNUSABLE)
        except Exception as error:
            text = f"unexpected {type(error).__name__}: {error}"
            _end(ctx, f"{text}\nThis is a fault of splitft; `splitft --debug ...` shows where.", FAULT)


def _end(ctx: click.Context, message: str, status: int) -> None:
    """Say why and leave; with --debug, let the exception through as it is."""
    if ctx.params.get("debug"):
        raise  # noqa: PLE0704 (called while an exception is handled)
    typer.echo(f"splitft: {message}", err=True)
    raise typer.Exit(status)
