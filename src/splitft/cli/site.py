"""Verb of the data owner: splitft deploy site, which writes a site's file and checks it.

FILE --check--> a table of what was looked at, and whether this site would take part
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitft.cli.app import console, say, without_traceback
from splitft.cli.deploy import deploy
from splitft.errors import DeployError

if TYPE_CHECKING:
    from splitft.deploy.site.check import SiteFinding


def site(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write or to check.")],
    check: Annotated[
        bool, typer.Option("--check", help="Check an existing file: open its text and its model.")
    ] = False,
    run: Annotated[
        Path | None, typer.Option(help="With --check: configuration of a run to check against.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="With --run: name of this site in the run.", show_default="that of the kit around FILE"
        ),
    ] = None,
) -> None:
    """Write a data owner's commented site file, or check one, alone or against a run."""
    from splitft.config import load
    from splitft.deploy.site.policy import load_site, site_template

    if not check:
        if run is not None or name is not None:
            raise DeployError("--run and --name need --check: they check an existing file against a run")
        if file.exists():
            raise DeployError(f"{file} exists already; give another name, or --check it")
        file.write_text(site_template(), encoding="utf-8")
        typer.echo(f"wrote {file}; put it into local/ of the site's kit")
        return
    from splitft.deploy.site.check import check_site

    own = load_site(file)
    name = name or _name_of_kit(file)
    _show(file, run, name, check_site(own, None if run is None else load(run), name))


def _show(file: Path, run: Path | None, name: str | None, findings: list[SiteFinding]) -> None:
    """Print what was found, and raise DeployError with the reasons if the site would decline."""
    from splitft.tracking.table import Table

    screen = console()
    loud = [index for index, one in enumerate(findings) if one.verdict in ("WARNING", "declines")]
    say(screen, f"{name or file}{'' if run is None else f' in {run}'}", "")
    screen.print(
        Table(
            ("", "what", "found"),
            [(one.verdict, one.subject, one.said) for one in findings],
            align="lll",
            bold=loud,
            wrap=(2,),
        ).to_rich()
    )
    reasons = [f"{one.subject}: {one.said}" for one in findings if one.verdict == "declines"]
    if reasons:
        raise DeployError("this site would decline:\n" + "\n".join(reasons))
    what = "can be read" if run is None else f"fits {run}: this site would take part"
    say(screen, "", f"{file} {what}")


def _name_of_kit(file: Path) -> str | None:
    """Return the site's name if the file lies in `local/` of its kit."""
    try:
        from splitft.deploy.identity.certificates import certificate_of

        return certificate_of(file.resolve().parent.parent).name
    except (ImportError, DeployError):  # no cryptography is installed, or there is no kit around it
        return None


deploy.command()(without_traceback(site))
