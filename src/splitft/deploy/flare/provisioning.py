"""Make the startup kits of a whole federation on one machine, and prepare a kit before it runs.

    server, sites --provision--> KITS/HOST  KITS/SITE ...  KITS/submitter@...  KITS/admin@...

Every kit has its own key and certificate, signed by a root that stays in `KITS/.authority`. On one machine
that is convenient; whoever makes kits for others this way has held their keys (`identity.authority` is the
way in which each key is made where it stays). A site only opens connections, to the server's one port, and
both sides check TLS certificates. What a kit's holder may do, and what a job may start, is in
`permissions`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from splitft.deploy.flare.permissions import RESOURCES, read_resources, write_permissions
from splitft.deploy.identity.authority import (
    PROJECT,
    approve,
    create_authority,
    make_private,
    package,
    request,
)
from splitft.deploy.identity.certificates import certificate_of
from splitft.errors import DeployError
from splitft.files import write_whole

__all__ = [
    "ADMIN",
    "AUTHORITY",
    "PROJECT",
    "SUBMITTER",
    "Kits",
    "kind_of",
    "party_of",
    "prepare_kit",
    "provision",
]

SUBMITTER, ADMIN = "submitter@splitft.local", "admin@splitft.local"
"""Names of the parties that submit runs, and that administer the federation, as `provision` makes them."""
AUTHORITY = ".authority"
"""Folder of the root certificate's key."""


@dataclass(frozen=True)
class Kits:
    """The startup kits of one federation."""

    folder: Path
    """One folder for each party, and the authority."""
    server: str
    """Host name of the server."""
    sites: tuple[str, ...]

    def of(self, party: str) -> Path:
        """Return a party's kit."""
        return self.folder / party

    @property
    def submitter(self) -> Path:
        """The kit of whoever submits, watches and stops runs."""
        return self.folder / SUBMITTER

    @property
    def admin(self) -> Path:
        """The administrator's kit; it cannot submit."""
        return self.folder / ADMIN


def provision(folder: Path, server: str, port: int, sites: Sequence[str]) -> Kits:
    """Make certificates and kits. Raises DeployError if the folder is not empty or FLARE fails."""
    if folder.exists() and any(folder.iterdir()):
        raise DeployError(f"{folder} exists and is not empty; give another folder")
    roles = {server: "server", **dict.fromkeys(sites, "site"), SUBMITTER: "submitter", ADMIN: "administrator"}
    if len(roles) < len(sites) + 3:
        raise DeployError(f"no kits could be made: two of {server}, {', '.join(sites)} have the same name")
    try:
        create_authority(folder / AUTHORITY, server, port)
        for name, role in roles.items():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                asked = request(name, role, Path(scratch) / "request")
                signed = Path(scratch) / f"{name}.signed.zip"
                approve(asked, folder / AUTHORITY, signed, role)
                package(signed, Path(scratch) / "request", folder / name)
        for party in (server, *sites):
            prepare_kit(folder / party)
        make_private(folder)
    except DeployError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise DeployError(f"no kits could be made: {error}") from error
    return Kits(folder, server, tuple(sites))


def kind_of(kit: Path) -> str:
    """Return the kind of a kit, `server` or `client`. Raises DeployError if it is neither's."""
    for kind in ("server", "client"):
        if (kit / "startup" / f"fed_{kind}.json").is_file():
            return kind
    raise DeployError(f"{kit} is no startup kit of a server or a site: it has no startup/fed_*.json")


def prepare_kit(kit: Path) -> str:
    """Adjust a kit to its present folder; returns `server` or `client`. Raises DeployError if it is none.

    The permissions are written anew each time, so that a kit that lacks them, or has wider ones, has ours.
    """
    kind = kind_of(kit)
    write_permissions(kit, kind)
    resources = read_resources(kit)
    if kind == "client":  # a site's log is its own; FLARE's default is to send it to the server
        resources["allow_log_streaming"] = False
    if kind == "server":  # FLARE's default is one place in /tmp for all federations of a machine
        storage = kit / "storage"
        resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(storage / "snapshots")
        for component in resources["components"]:
            if component["id"] == "job_manager":
                component["args"]["uri_root"] = str(storage / "jobs")
    write_whole(kit / "local" / RESOURCES, json.dumps(resources, indent=2))
    for part in (kit, kit / "startup", kit / "local"):
        part.chmod(part.stat().st_mode & 0o700)
    return kind


def party_of(kit: Path) -> str:
    """Return the name in a kit's certificate: a site or the server. Raises DeployError if it has none."""
    return certificate_of(kit).name
