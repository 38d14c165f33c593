"""Make certificates and startup kits, with every private key made where it stays.

    authority          create_authority -> DIR/rootCA.key, rootCA.pem, federation.yaml
    party              request          -> REQUEST/NAME.key (stays), NAME.request.zip (to the authority)
    authority          approve          -> NAME.signed.zip (back to the party; holds no secret)
    party              package          -> KIT

These are FLARE's own requests, approvals and packages (`nvflare cert`, `nvflare package`), run quietly and
with our checks: the authority says which role it approves, and keeps each certificate that it has signed, so
that it can be withdrawn. A kit is renewed by a request of its own, packaged over it: `local/` stays as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509
from nvflare.tool import cli_output
from nvflare.tool.cert import cert_commands
from nvflare.tool.package import package_commands

from splitft.deploy.identity.certificates import ROOT, certificate_of, facts_of, root_of
from splitft.deploy.identity.revocation import REVOKED, revoke
from splitft.errors import DeployError

PROJECT = "splitft"
FEDERATION = "federation.yaml"
ISSUED = "issued"
"""Folder of the authority with every certificate that it has signed."""
VALID_DAYS, ROOT_VALID_DAYS = 365, 3650
ROLES: dict[str, dict[str, str]] = {
    "site": {"type": "client"},
    "server": {"type": "server"},
    "submitter": {"type": "admin", "role": "lead"},
    "administrator": {"type": "admin", "role": "org_admin"},
}
"""Roles of a party, as FLARE describes them."""
_CERTIFIED = {"client": "site", "server": "server", "lead": "submitter", "org_admin": "administrator"}
"""Our roles by the role in a certificate."""


@dataclass(frozen=True)
class Request:
    """What a party asks the authority for."""

    name: str
    role: str
    file: Path


def create_authority(folder: Path, server: str, port: int, valid_days: int = ROOT_VALID_DAYS) -> str:
    """Make the root of a federation; returns its fingerprint. Raises DeployError if `folder` is in use."""
    if folder.exists() and any(folder.iterdir()):
        raise DeployError(f"{folder} exists and is not empty; give another folder")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    federation = {
        "name": PROJECT,
        "scheme": "tcp",
        "connection_security": "mtls",
        "server": {"host": server, "fed_learn_port": port},
    }
    (folder / FEDERATION).write_text(yaml.safe_dump(federation), encoding="utf-8")
    arguments = {"output_dir": str(folder), "org": None, "valid_days": valid_days, "deploy_version": "00"}
    _flare(cert_commands.handle_cert_init, profile=str(folder / FEDERATION), **arguments)
    make_private(folder)
    return _colons(facts_of(_certificate(folder / ROOT)).fingerprint)


def request(name: str, role: str, folder: Path) -> Path:
    """Make a key and a request for a certificate in `folder`; returns the file for the authority."""
    if role not in ROLES:
        raise DeployError(f"{role!r} is no role; choose {', '.join(ROLES)}")
    if ROLES[role]["type"] == "admin" and "@" not in name:
        raise DeployError(f"{name!r}: a {role} is named like a mail address, such as ada@hospital.org")
    file = folder / f"{name}.request.zip"
    if folder.exists() and any(folder.iterdir()):
        raise DeployError(f"{folder} exists and is not empty: its key may be in use; give another folder")
    party = {"name": name, "org": PROJECT, **ROLES[role]}
    with tempfile.TemporaryDirectory() as scratch:
        description = Path(scratch) / "party.yaml"
        description.write_text(yaml.safe_dump({"name": PROJECT, "participants": [party]}), encoding="utf-8")
        _flare(cert_commands.handle_cert_request, participant=str(description), output_dir=str(folder))
    make_private(folder)
    return file


def read_request(file: Path) -> Request:
    """Read who a request is for. Raises DeployError if it is none."""
    try:
        with zipfile.ZipFile(file) as archive:
            meta = json.loads(archive.read("request.json"))
        return Request(str(meta["name"]), _CERTIFIED[str(meta["cert_type"])], file)
    except (OSError, ValueError, LookupError, TypeError, zipfile.BadZipFile) as error:
        raise DeployError(f"{file} is no request of `splitft deploy request`: {error}") from error


def approve(
    file: Path, authority: Path, to: Path, role: str = "site", valid_days: int = VALID_DAYS
) -> Request:
    """Sign a request into `to`. Raises DeployError if it asks for another role, or cannot be signed."""
    if not (authority / FEDERATION).is_file():
        raise DeployError(
            f"{authority} is no authority: it has no {FEDERATION}; `splitft deploy authority` makes one"
        )
    asked = read_request(file)
    if asked.role != role:
        raise DeployError(
            f"{file} asks for the role {asked.role} for {asked.name!r}, not {role}; if that is "
            f"meant, approve it with --role {asked.role}"
        )
    _flare(
        cert_commands.handle_cert_approve,
        request_zip=str(file),
        ca_dir=str(authority),
        profile=str(authority / FEDERATION),
        signed_zip=str(to),
        valid_days=valid_days,
    )
    with zipfile.ZipFile(to) as archive:
        content = archive.read(f"{asked.name}.crt")
    issued = authority / ISSUED / f"{facts_of(x509.load_pem_x509_certificate(content)).fingerprint}.crt"
    issued.parent.mkdir(exist_ok=True, mode=0o700)
    issued.write_bytes(content)
    return asked


def package(signed: Path, folder: Path, kit: Path, fingerprint: str | None = None) -> str:
    """Put a startup kit together from an approval and the request's folder; returns the root's fingerprint.

    An existing kit of the same party is renewed: its `local/` and its runs stay. Raises DeployError if the
    approval is not for this request, or, with `fingerprint`, not from that root.
    """
    with tempfile.TemporaryDirectory() as scratch:
        found = _flare(
            package_commands.handle_package,
            input=str(signed),
            workspace=scratch,
            request_dir=str(folder),
            expected_fingerprint=fingerprint,
        )
        made = Path(str(found["output_dir"]))
        if not kit.exists() or not any(kit.iterdir()):
            kit.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(made, kit, dirs_exist_ok=True)
        else:
            _renew(made, kit, fingerprint)
    make_private(kit)
    return _colons(root_of(kit).fingerprint)


def request_renewal(kit: Path, folder: Path) -> Path:
    """Make a new key and a request for the party of a kit; returns the file for the authority."""
    own = certificate_of(kit)
    if own.role not in _CERTIFIED:
        raise DeployError(
            f"{kit} was made by an older `provision`, with a role that is no longer used "
            f"({own.role or 'none'}); make a new request: splitft deploy request NAME"
        )
    return request(own.name, _CERTIFIED[own.role], folder)


def withdraw(name: str, authority: Path) -> int:
    """Put every certificate of a name on the authority's list; returns how many. Raises DeployError at 0."""
    issued = [facts_of(_certificate(path)) for path in sorted((authority / ISSUED).glob("*.crt"))]
    of_name = [one.fingerprint for one in issued if one.name == name]
    if not of_name:
        known = ", ".join(sorted({one.name for one in issued})) or "nobody"
        raise DeployError(f"{authority} has signed no certificate of {name!r}; it has of {known}")
    revoke(authority / REVOKED, name, of_name)
    return len(of_name)


def make_private(folder: Path) -> None:
    """Let nobody but the owner read a folder and what is in it."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & 0o700)


def _renew(made: Path, kit: Path, fingerprint: str | None) -> None:
    """Replace the certificates of a kit by those of a new one of the same party."""
    old, new = certificate_of(kit), certificate_of(made)
    if (old.name, old.role) != (new.name, new.role):
        raise DeployError(
            f"{kit} is the kit of {old.name}, and the approval is for {new.name}; give another folder"
        )
    if root_of(kit).fingerprint != root_of(made).fingerprint and fingerprint is None:
        raise DeployError(
            f"the approval is from another root than the kit {kit}: {_colons(root_of(made).fingerprint)}. "
            "If the federation has a new authority, give its fingerprint: --fingerprint"
        )
    before = kit / "startup.before"
    shutil.rmtree(before, ignore_errors=True)
    shutil.copytree(made / "startup", kit / "startup.new", dirs_exist_ok=True)
    (kit / "startup").rename(before)
    (kit / "startup.new").rename(kit / "startup")
    shutil.rmtree(before)


def _flare(handler: Callable[[Any], int], **arguments: Any) -> dict[str, Any]:
    """Run one of FLARE's command handlers and return its result. Raises DeployError with FLARE's reason."""
    output, status = io.StringIO(), 0
    with _alone(output):
        try:
            status = handler(argparse.Namespace(force=False, schema=False, **arguments)) or 0
        except SystemExit as end:
            status = int(end.code or 0) if not isinstance(end.code, str) else 1
    answers = [
        json.loads(line) for line in output.getvalue().splitlines() if line.startswith('{"schema_version"')
    ]
    answer = answers[-1] if answers else {}
    if status or answer.get("status") != "ok":
        text = answer.get("message") or output.getvalue().strip().splitlines()[-1:] or "no reason was given"
        raise DeployError(re.sub(r"\s+", " ", f"FLARE refuses: {text} {answer.get('hint', '')}").strip())
    data: dict[str, Any] = answer["data"]
    return data


@contextlib.contextmanager
def _alone(output: io.StringIO) -> Iterator[None]:
    """Keep FLARE's commands from the terminal, the command line, and the home folder (audit files)."""
    before = os.environ.get("HOME"), sys.argv, cli_output._output_format
    with tempfile.TemporaryDirectory() as home:
        os.environ["HOME"], sys.argv = home, sys.argv[:1]
        cli_output.set_output_format("json")
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
                yield
        finally:
            sys.argv = before[1]
            cli_output.set_output_format(before[2])
            if before[0] is None:
                del os.environ["HOME"]
            else:
                os.environ["HOME"] = before[0]


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DeployError(f"{path}: the certificate cannot be read ({error})") from error


def _colons(fingerprint: str) -> str:
    """Write a fingerprint as people read it aloud: SHA256:AB:CD:..."""
    pairs = [fingerprint[at : at + 2].upper() for at in range(0, len(fingerprint), 2)]
    return "SHA256:" + ":".join(pairs)
