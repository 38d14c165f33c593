"""Find out why a site does not reach its server, by trying what it tries and reading each answer.

name -> address -> port -> TLS (the server's certificate, then ours) -> explanation, None if all is well
"""

from __future__ import annotations

import json
import socket
import ssl
from pathlib import Path

from splitft.deploy.identity.certificates import ROOT
from splitft.errors import DeployError

TRY_S = 5.0
"""Longest wait for each step."""


def server_of(kit: Path) -> tuple[str, int]:
    """Return the host and port that a site's kit connects to. Raises DeployError if it names none."""
    path = kit / "startup" / "fed_client.json"
    try:
        target = str(json.loads(path.read_text(encoding="utf-8"))["servers"][0]["service"]["target"])
        host, _, port = target.rpartition(":")
        return host, int(port)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DeployError(f"{path} names no server: {error}") from error


def explain(kit: Path) -> str | None:
    """Return why a kit's connection to its server fails, and what to do; None if it works."""
    host, port = server_of(kit)
    try:
        line = socket.create_connection((host, port), timeout=TRY_S)
    except socket.gaierror:
        return (
            f"the name {host} is not known to this machine; is it right, and does DNS or /etc/hosts have it?"
        )
    except TimeoutError:
        return f"{host} does not answer at port {port}: a firewall drops the connection, or the host is down"
    except ConnectionRefusedError:
        return f"{host} refuses port {port}: the server does not run, or listens at another port"
    except OSError as error:
        return f"{host} port {port} cannot be reached: {error.strerror or error}"
    with line:
        return _explain_tls(kit, line, host)


def _explain_tls(kit: Path, line: socket.socket, host: str) -> str | None:
    startup = kit / "startup"
    try:
        context = ssl.create_default_context(cafile=str(startup / ROOT))
        context.check_hostname = False  # as FLARE, which compares the name when the site registers
        context.load_cert_chain(startup / "client.crt", startup / "client.key")
    except (ssl.SSLError, OSError) as error:
        return f"the certificate or the key of {kit} cannot be used: {error}"
    try:
        with context.wrap_socket(line, server_hostname=host) as secure:
            secure.settimeout(TRY_S / 2)
            try:
                if secure.recv(1) == b"":
                    return (
                        "the server ended the connection once it had seen this kit's certificate: it was "
                        "revoked, perhaps; the server's log says"
                    )
            except TimeoutError:
                return None  # it waits for us to speak
            return None
    except ssl.SSLCertVerificationError as error:
        return _server_certificate(error.verify_message or str(error), host)
    except TimeoutError:
        return f"{host} accepts the connection, and says nothing: the server is busy, or this is not its port"
    except (ssl.SSLError, ConnectionError) as error:
        return _own_certificate(str(error), host)


def _server_certificate(reason: str, host: str) -> str:
    """Explain why the server's certificate is not accepted."""
    if "expired" in reason:
        return f"the certificate of the server {host} has expired; whoever runs the server renews it"
    if "not yet valid" in reason:
        return f"the certificate of the server {host} is not valid yet; one of the two clocks is wrong"
    return (
        f"the server {host} is not of this kit's federation: its certificate is from another root ({reason})"
        ". The kit is for another server or an older federation, or something on the way decrypts TLS"
    )


def _own_certificate(reason: str, host: str) -> str:
    """Explain why the server does not accept this kit's certificate."""
    low = reason.lower()
    if "expired" in low:
        return "the server says that this kit's certificate has expired; renew it: splitft deploy renew KIT"
    if "unknown ca" in low or "decrypt error" in low or "bad certificate" in low:
        return (
            f"the server {host} does not accept this kit's certificate: it is from another federation's root"
        )
    if "wrong version number" in low or "record layer" in low:
        return f"{host} does not speak TLS at this port: it is another service, or a proxy"
    return f"the TLS connection to {host} fails: {reason}"
