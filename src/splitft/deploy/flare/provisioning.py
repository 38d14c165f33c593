"""Make certificates and startup kits for named parties with FLARE's own provisioning.

    server, sites --provision--> KITS/HOST  KITS/SITE ...  KITS/admin@splitft.local    one for each machine

Every kit has its own key and certificate, signed by a root that is made once and stays in `KITS/.authority`.
Whoever has that folder can admit new parties, so it stays with the project. A site only opens connections, to
the server's one port, and both sides check TLS certificates. Each kit lists the classes that a job may start,
FLARE's own and ours by name, so that no job can bring code.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare.lighter.constants import CtxKey
from nvflare.lighter.prov_utils import prepare_builders
from nvflare.lighter.provision import prepare_project
from nvflare.lighter.provisioner import Provisioner

from splitft.errors import DeployError

PROJECT = "splitft"
ADMIN = "admin@splitft.local"
"""Name of the party that submits runs."""
OURS = ("splitft.deploy.flare.job.",)
"""Prefixes of the classes that a run's job starts."""
AUTHORITY = ".authority"
"""Folder of the root certificate's key."""
_LIGHTER = "nvflare.lighter.impl"


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
    def admin(self) -> Path:
        """The admin's kit."""
        return self.folder / ADMIN


def provision(folder: Path, server: str, port: int, sites: Sequence[str]) -> Kits:
    """Make certificates and kits. Raises DeployError if the folder is not empty or FLARE fails."""
    if folder.exists() and any(folder.iterdir()):
        raise DeployError(f"{folder} exists and is not empty; give another folder")
    project = {
        "api_version": 3,
        "name": PROJECT,
        "description": "federated split fine-tuning",
        "participants": [
            {"name": server, "type": "server", "org": PROJECT, "fed_learn_port": port},
            *({"name": site, "type": "client", "org": PROJECT} for site in sites),
            {"name": ADMIN, "type": "admin", "org": PROJECT, "role": "project_admin"},
        ],
        "builders": [
            {
                "path": f"{_LIGHTER}.workspace.WorkspaceBuilder",
                "args": {"template_file": ["master_template.yml"]},
            },
            {
                "path": f"{_LIGHTER}.static_file.StaticFileBuilder",
                "args": {"config_folder": "config", "scheme": "tcp"},
            },
            {"path": f"{_LIGHTER}.cert.CertBuilder", "args": {}},
            {"path": f"{_LIGHTER}.signature.SignatureBuilder", "args": {}},
        ],
    }
    # root certificate, and a certificate and a kit for each party
    authority, output = folder / AUTHORITY, io.StringIO()
    authority.mkdir(parents=True, mode=0o700)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            made = Provisioner(str(authority), prepare_builders(project)).provision(prepare_project(project))
        if made.get(CtxKey.BUILD_ERROR):
            raise ValueError(output.getvalue().strip().splitlines()[-1])
    except ValueError as error:
        shutil.rmtree(folder)
        raise DeployError(f"no kits could be made: {error}") from error
    # one folder for each kit
    for kit in Path(str(made[CtxKey.CURRENT_PROD_DIR])).iterdir():
        shutil.move(kit, folder / kit.name)
    kits = Kits(folder, server, tuple(sites))
    for party in (server, *sites):
        _allow_our_classes(kits.of(party))
    return kits


def prepare_kit(kit: Path) -> str:
    """Adjust a kit to its present folder; returns `server` or `client`. Raises DeployError if it is none."""
    kind = next(
        (one for one in ("server", "client") if (kit / "startup" / f"fed_{one}.json").is_file()), None
    )
    if kind is None:
        raise DeployError(f"{kit} is no startup kit of a server or a site: it has no startup/fed_*.json")
    _allow_our_classes(kit)
    path = kit / "local" / "resources.json"
    resources: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if kind == "client":  # a site's log is its own; FLARE's default is to send it to the server
        resources["allow_log_streaming"] = False
    if kind == "server":  # FLARE's default is one place in /tmp for all federations of a machine
        storage = kit / "storage"
        resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(storage / "snapshots")
        for component in resources["components"]:
            if component["id"] == "job_manager":
                component["args"]["uri_root"] = str(storage / "jobs")
    path.write_text(json.dumps(resources, indent=2), encoding="utf-8")
    return kind


def party_of(kit: Path) -> str:
    """Return the name in a kit's certificate: a site or the server. Raises DeployError if it has none."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    for file in ("server.crt", "client.crt"):
        path = kit / "startup" / file
        if path.is_file():
            names = x509.load_pem_x509_certificate(path.read_bytes()).subject
            return str(names.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    raise DeployError(f"{kit} has no certificate")


def _allow_our_classes(kit: Path) -> None:
    """Let jobs start our classes beside those of FLARE's own list."""
    local = kit / "local"
    own, default = local / "resources.json", local / "resources.json.default"
    path = own if own.is_file() else default
    try:
        resources: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DeployError(f"{path} cannot be read ({error}); is {kit} a whole startup kit?") from error
    allowed = resources.setdefault("class_allow_list", [])
    allowed.extend(prefix for prefix in OURS if prefix not in allowed)
    own.write_text(json.dumps(resources, indent=2), encoding="utf-8")
