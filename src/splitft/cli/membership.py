"""Verbs for who is in a federation: splitft deploy authority, request, approve, package, renew, revoke.

authority (once)   splitft deploy authority run.yaml --to authority
each party         splitft deploy request NAME               key here, request to the authority
authority          splitft deploy approve NAME.request.zip   approval back to the party
each party         splitft deploy package NAME.signed.zip    kit here
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from splitft.cli.app import ConfigFile, Overrides
from splitft.cli.deploy import deployed
from splitft.errors import DeployError

Authority = Annotated[Path, typer.Option(help="Folder of the authority.")]
Days = Annotated[int, typer.Option(min=1, max=3650, help="Days for which the certificate is valid.")]
Kit = Annotated[Path, typer.Argument(metavar="KIT", help="Startup kit.")]
Role = Annotated[str, typer.Option(help="site, server, submitter or administrator.")]


@deployed
def authority(
    file: ConfigFile,
    overrides: Overrides = None,
    to: Annotated[Path, typer.Option(help="Folder to make; keep it safe.")] = Path("authority"),
) -> None:
    """Make the root certificate of a federation. It admits parties, and knows none of their keys."""
    from splitft.config import load
    from splitft.deploy.identity.authority import create_authority

    config = load(file, overrides or [])
    fingerprint = create_authority(to, config.deploy.server, config.deploy.port)
    typer.echo(f"authority  {to}   for the server {config.deploy.server}, port {config.deploy.port}")
    typer.echo(f"root       {fingerprint}")
    typer.echo("Whoever has this folder admits parties: keep it off the server, and back it up")
    typer.echo("Tell every party the line `root` by another way than mail, such as by telephone")
    typer.echo("Each party: splitft deploy request NAME; then here: splitft deploy approve NAME.request.zip")


@deployed
def request(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Site, host of the server, or mail address of a person.")
    ],
    role: Role = "site",
    to: Annotated[
        Path | None, typer.Option(help="Folder for the key and the request.", show_default="NAME.request")
    ] = None,
) -> None:
    """Make a private key, which stays here, and a request for a certificate."""
    from splitft.deploy.identity.authority import request as make_request

    folder = to or Path(f"{name}.request")
    file = make_request(name, role, folder)
    typer.echo(f"key      {folder / f'{name}.key'}   it stays on this machine")
    typer.echo(f"request  {file}   send it to whoever has the authority; it holds no secret")


@deployed
def approve(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Request, NAME.request.zip.")],
    authority: Authority = Path("authority"),
    role: Role = "site",
    to: Annotated[
        Path | None, typer.Option(help="Approval to write.", show_default="NAME.signed.zip")
    ] = None,
    valid_days: Days = 365,
) -> None:
    """Sign a request. Make sure that it comes from the party that it names."""
    from splitft.deploy.identity.authority import approve as sign
    from splitft.deploy.identity.authority import read_request

    target = to or file.parent / f"{read_request(file).name}.signed.zip"
    asked = sign(file, authority, target, role, valid_days)
    typer.echo(f"approved  {asked.name} as {asked.role} for {valid_days} days")
    typer.echo(f"approval  {target}   send it back to {asked.name}; it holds no secret")


@deployed
def package(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Approval, NAME.signed.zip.")],
    request: Annotated[Path, typer.Option(help="Folder of the request.")],
    to: Annotated[Path, typer.Option(help="Kit to make, or to renew.")],
    fingerprint: Annotated[
        str | None, typer.Option(help="Fingerprint of the root, as the authority tells it.")
    ] = None,
) -> None:
    """Put the startup kit together, from an approval and the key that is here."""
    from splitft.deploy.flare.provisioning import prepare_kit
    from splitft.deploy.identity.authority import package as make_kit
    from splitft.deploy.identity.certificates import certificate_of, check_kit
    from splitft.deploy.site.policy import SITE_FILE, site_template
    from splitft.files import write_whole

    root = make_kit(file, request, to, fingerprint)
    own = certificate_of(to)
    if own.role in ("server", "client"):
        prepare_kit(to)
    if own.role == "client" and not (to / "local" / SITE_FILE).exists():
        write_whole(to / "local" / SITE_FILE, site_template())
        (to / "local" / SITE_FILE).chmod(0o600)
    check_kit(to)
    shutil.rmtree(request)  # the key is in the kit now, and nowhere else
    typer.echo(f"kit   {to}   for {own.name}, valid until {own.ends:%Y-%m-%d}")
    typer.echo(f"root  {root}")
    if fingerprint is None:
        typer.echo("Compare the line `root` with what the authority tells you by telephone, before you start")


@deployed
def renew(
    kit: Kit,
    to: Annotated[
        Path | None, typer.Option(help="Folder for the key and the request.", show_default="KIT/renewal")
    ] = None,
) -> None:
    """Make a new key and a request for the party of a kit, before its certificate ends."""
    from splitft.deploy.identity.authority import request_renewal

    folder = to or kit / "renewal"
    file = request_renewal(kit, folder)
    typer.echo(f"request  {file}   send it to whoever has the authority")
    typer.echo(
        f"Then: splitft deploy package NAME.signed.zip --request {folder} --to {kit}; and start it again"
    )


@deployed
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Party whose certificates are withdrawn.")],
    authority: Authority = Path("authority"),
    kit: Annotated[
        Path | None, typer.Option(help="Startup kit of the server, if it is on this machine.")
    ] = None,
) -> None:
    """Withdraw every certificate of a party; the server refuses it from then on, and ends its connections."""
    from splitft.deploy.flare.provisioning import kind_of
    from splitft.deploy.identity.authority import withdraw
    from splitft.deploy.identity.revocation import REVOKED
    from splitft.files import write_whole

    if kit is not None and kind_of(kit) != "server":
        raise DeployError(f"{kit} is the kit of a site; the list belongs to the server")
    count = withdraw(name, authority)
    typer.echo(f"revoked  {count} certificate{'s' if count > 1 else ''} of {name}")
    source = authority / REVOKED
    if kit is None:
        typer.echo(
            f"Copy {source} to local/{REVOKED} of the server's kit: from then on it holds, without a restart"
        )
        return
    write_whole(kit / "local" / REVOKED, source.read_text(encoding="utf-8"))
    typer.echo(f"The server refuses it from now on ({kit / 'local' / REVOKED})")
