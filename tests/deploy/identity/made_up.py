"""Certificates of any age and any root, and kits that have them; keys are elliptic, which takes no time."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Signed:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def key_pem(self) -> bytes:
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def signed(name: str, root: Signed | None = None, begins: float = -400, ends: float = 400, role="client"):
    """A certificate from `begins` to `ends`, in days from now; without a root it is one."""
    key = ec.generate_private_key(ec.SECP256R1())
    names = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
    if root is not None:
        names.append(x509.NameAttribute(NameOID.UNSTRUCTURED_NAME, role))
    subject, now = x509.Name(names), datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if root is None else root.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begins * DAY)
        .not_valid_after(now + ends * DAY)
        .add_extension(x509.BasicConstraints(ca=root is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if root is None:
        usage = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "encipher_only", "decipher_only"), False,
        )  # fmt: skip
        builder = builder.add_extension(
            x509.KeyUsage(digital_signature=True, key_cert_sign=True, crl_sign=True, **usage), critical=True
        )
    else:
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(root.key.public_key())
        builder = builder.add_extension(issuer, critical=False)
    signer = key if root is None else root.key
    return Signed(builder.sign(signer, hashes.SHA256()), key)


def kit(
    folder: Path, own: Signed, root: Signed, port: int = 0, file: str = "client", host="127.0.0.1"
) -> Path:
    """A startup kit with this certificate, for a server at this port."""
    startup = folder / "startup"
    startup.mkdir(parents=True)
    (startup / f"{file}.crt").write_bytes(own.pem())
    (startup / f"{file}.key").write_bytes(own.key_pem())
    (startup / "rootCA.pem").write_bytes(root.pem())
    target = {"servers": [{"service": {"target": f"{host}:{port}"}}]}
    (startup / f"fed_{file}.json").write_text(json.dumps(target))
    return folder
