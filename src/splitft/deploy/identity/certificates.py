"""Read the certificate of a startup kit, and check it before it is used.

    KIT/startup/  server.crt | client.crt    the party's own, with its key
                  rootCA.pem                 the root that has signed everybody's

Certificates end. From 30 days before, `warnings_of` says so; afterwards no connection is made.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID

from splitft.errors import DeployError

WARN_DAYS = 30
"""Days before the end of a certificate from which on there is a warning."""
ROOT = "rootCA.pem"
PEERS = "peers.json"
"""File in the server's kit: when the certificate of each party that has connected ends."""
_OWN = ("server.crt", "client.crt")


@dataclass(frozen=True)
class Certificate:
    """The facts of a certificate."""

    name: str
    role: str
    """client (a site), server, lead (a submitter) or org_admin; empty for a root."""
    begins: datetime.datetime
    ends: datetime.datetime
    fingerprint: str
    """SHA-256 of the certificate, in hexadecimal."""

    def days_left(self, now: datetime.datetime | None = None) -> float:
        """Return the days until it ends; negative if it has ended."""
        return (self.ends - (now or _now())).total_seconds() / 86400


def certificate_of(kit: Path) -> Certificate:
    """Read a kit's own certificate. Raises DeployError if it has none."""
    return facts_of(_load(_own_file(kit)))


def root_of(kit: Path) -> Certificate:
    """Read the root certificate in a kit. Raises DeployError if it has none."""
    return facts_of(_load(kit / "startup" / ROOT))


def facts_of(certificate: x509.Certificate) -> Certificate:
    """Return the facts of a certificate."""

    def text(oid: x509.ObjectIdentifier) -> str:
        found = certificate.subject.get_attributes_for_oid(oid)
        return str(found[0].value) if found else ""

    return Certificate(
        text(NameOID.COMMON_NAME),
        text(NameOID.UNSTRUCTURED_NAME),
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
        certificate.fingerprint(hashes.SHA256()).hex(),
    )


def check_kit(kit: Path) -> Certificate:
    """Check that a kit's certificate is valid now, fits its key, and is signed by the kit's root.

    Raises DeployError that says which of them is not so, and what to do.
    """
    path = _own_file(kit)
    own, root = _load(path), _load(kit / "startup" / ROOT)
    try:
        key = load_pem_private_key(path.with_suffix(".key").read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise DeployError(f"{path.with_suffix('.key')}: the private key cannot be read ({error})") from error
    if key.public_key() != own.public_key():
        raise DeployError(f"{path} does not belong to the private key beside it; package the kit again")
    try:
        own.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise DeployError(
            f"{path} is not signed by {kit / 'startup' / ROOT}: the kit was put together from two federations"
            "; package it again"
        ) from error
    now, facts = _now(), facts_of(own)
    for whose, one in (
        (f"the certificate of {facts.name}", facts),
        ("the federation's root", facts_of(root)),
    ):
        if now > one.ends:
            raise DeployError(f"{whose} expired on {_day(one.ends)}; {_RENEW if one is facts else _NEW_ROOT}")
        if now < one.begins:
            raise DeployError(
                f"{whose} is valid from {_day(one.begins)} on; is this machine's clock right? It says "
                f"{_day(now)}"
            )
    return facts


def warnings_of(certificates: Iterable[Certificate], now: datetime.datetime | None = None) -> Sequence[str]:
    """Return a line for each certificate that has ended or ends within 30 days."""
    lines = []
    for one in certificates:
        days = one.days_left(now)
        what = f"the certificate of {one.name}" if one.role else "the federation's root certificate"
        remedy = _RENEW if one.role else _NEW_ROOT
        if days < 0:
            lines.append(f"{what} expired on {_day(one.ends)}; {remedy}")
        elif days < WARN_DAYS:
            lines.append(f"{what} ends in {days:.0f} days, on {_day(one.ends)}; {remedy}")
    return lines


def read_peers(kit: Path) -> dict[str, str]:
    """Return when the certificates of the parties end that have connected to the server of a kit."""
    try:
        found = json.loads((kit / PEERS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): str(end) for name, end in found.items()} if isinstance(found, dict) else {}


def warnings_of_peers(ends: object, now: datetime.datetime | None = None) -> Sequence[str]:
    """Return the warnings for names and ends of certificates as the server reports them."""
    found = []
    for name, text in ends.items() if isinstance(ends, dict) else ():
        try:
            end = datetime.datetime.fromisoformat(str(text))
        except ValueError:
            continue
        end = end if end.tzinfo else end.replace(tzinfo=datetime.UTC)
        found.append(Certificate(str(name), "peer", end, end, ""))
    return warnings_of(found, now)


_RENEW = "renew it: splitft deploy renew KIT"
_NEW_ROOT = "set up a new authority, and renew every kit"


def _own_file(kit: Path) -> Path:
    for file in _OWN:
        if (path := kit / "startup" / file).is_file():
            return path
    raise DeployError(f"{kit} has no certificate (startup/{' or startup/'.join(_OWN)})")


def _load(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DeployError(f"{path}: the certificate cannot be read ({error})") from error


def _day(time: datetime.datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC")


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
