"""Say what FLARE does not say about connections, and refuse those that may not be.

    server   a TLS handshake that fails: who tried, and why        a certificate on the revoked list
             a name that is connected already: the second one is refused, both are told
    site     connected, connection lost, not admitted, connected twice

FLARE shakes hands in the thread that accepts, so one silent peer would keep everybody else out; here each
peer has a thread of its own and ten seconds. Every process of ours sends an id of its own when it
connects: a site that reconnects shows the same id, a second process under its name another. Lines begin
with `splitft: `, and `splitft deploy start` repeats them. This module changes FLARE's classes before they
are used: FLARE has no settings for any of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography import x509
from nvflare.fuel.f3.drivers.driver_params import DriverParams
from nvflare.fuel.f3.drivers.tcp_driver import TcpStreamServer
from nvflare.fuel.f3.sfm.conn_manager import ConnManager
from nvflare.fuel.f3.sfm.constants import HandshakeKeys, Types
from nvflare.fuel.f3.sfm.sfm_conn import SfmConnection
from nvflare.private.fed.client.fed_client import FederatedClient

from splitft.deploy.identity.certificates import PEERS, Certificate, facts_of, read_peers, warnings_of
from splitft.deploy.identity.revocation import REVOKED, read_revoked
from splitft.errors import DeployError
from splitft.files import write_whole

MARK = "splitft: "
"""Beginning of the lines that are for the operator."""
CONNECTED, LOST, REFUSED = "connected as", "lost the connection", "refused:"
"""How the lines of a site begin that `deploy start` looks for."""
HANDSHAKE_S, PROBE_S, LOOK_S, QUIET_S = 10.0, 5.0, 2.0, 60.0
"""Longest handshake; wait for a sign of life of the earlier process; how often the revoked list is read; the
same line about the same peer is said once in this time."""
_INSTANCE, _REASON = "splitft_process", "splitft_refused"
_SERVER = "server"


def say(text: str) -> None:
    """Print one line for the operator."""
    print(MARK + "".join(char if char.isprintable() else "?" for char in text), flush=True)


# --- the server's side ----------------------------------------------------------------------------


class Gate:
    """The server's checks at each connection."""

    def __init__(self, kit: Path) -> None:
        self._list, self._peers = kit / "local" / REVOKED, kit / PEERS
        self._open: dict[Any, Certificate] = {}  # by socket
        self._said: dict[str, float] = {}
        self._ends = read_peers(kit)
        self._revoked: dict[str, str] = {}
        self._lock = threading.Lock()
        self.look()

    def admit(self, line: ssl.SSLSocket, address: Any) -> bool:
        """Shake hands with a peer; returns whether it may go on."""
        peer = str(address[0]) if isinstance(address, tuple) else str(address)
        line.settimeout(HANDSHAKE_S)
        try:
            line.do_handshake()
        except (ssl.SSLError, OSError) as error:
            self._once(f"a connection from {peer} failed: {explain_peer(error)}")
            return False
        line.settimeout(None)
        der = line.getpeercert(binary_form=True)
        if der is None:
            return True  # FLARE asks for a certificate; without one the handshake has failed
        found = facts_of(x509.load_der_x509_certificate(der))
        if hashlib.sha256(der).hexdigest() in self._revoked:
            self._once(f"a connection from {peer} is refused: the certificate of {found.name} was revoked")
            return False
        for warning in warnings_of([found]):
            self._once(warning, within_s=86400.0)
        with self._lock:
            self._open[line] = found
            self._ends[found.name] = found.ends.isoformat()
            write_whole(self._peers, json.dumps(self._ends, indent=2))
        return True

    def gone(self, line: ssl.SSLSocket) -> None:
        """Forget a connection."""
        with self._lock:
            self._open.pop(line, None)

    def look(self) -> None:
        """Read the revoked list, and close the connections of those that are on it."""
        try:
            self._revoked = dict(read_revoked(self._list))
        except DeployError as error:
            self._once(f"{error}; until then the list read before holds")
        with self._lock:
            lines = [(line, one) for line, one in self._open.items() if one.fingerprint in self._revoked]
        for line, one in lines:
            self._once(f"the connection of {one.name} is closed: its certificate was revoked")
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)

    def keep_looking(self) -> None:
        """Look at the list for as long as the process runs."""
        while True:
            time.sleep(LOOK_S)
            self.look()

    def _once(self, text: str, within_s: float = QUIET_S) -> None:
        now = time.monotonic()
        with self._lock:
            if now - self._said.get(text, -within_s) < within_s:
                return
            if len(self._said) > 1000:
                self._said.clear()
            self._said[text] = now
        say(text)


def watch_server(kit: Path) -> None:
    """Check each connection to the server of a kit, and say what comes of it."""
    gate = Gate(kit)
    made, finish, closed = (
        TcpStreamServer.__init__,
        TcpStreamServer.finish_request,
        TcpStreamServer.shutdown_request,
    )

    def listen(self: Any, driver: Any, connector: Any) -> None:
        made(self, driver, connector)
        if self.ssl_context:
            self.socket.do_handshake_on_connect = False  # in the thread of the connection instead

    def finish_request(self: Any, request: Any, address: Any) -> None:
        if not isinstance(request, ssl.SSLSocket) or gate.admit(request, address):
            finish(self, request, address)

    def shutdown_request(self: Any, request: Any) -> None:
        gate.gone(request)
        closed(self, request)

    TcpStreamServer.__init__, TcpStreamServer.finish_request = listen, finish_request
    TcpStreamServer.shutdown_request, TcpStreamServer.daemon_threads = shutdown_request, True
    ConnManager.update_endpoint = _one_process_a_name(ConnManager.update_endpoint)
    threading.Thread(target=gate.keep_looking, daemon=True).start()


def _one_process_a_name(update: Callable[..., None]) -> Callable[..., None]:
    """Return FLARE's handling of a greeting that refuses a second process under a connected name."""

    def update_endpoint(self: Any, line: Any, data: dict[str, Any]) -> None:
        name = str(data.get(HandshakeKeys.ENDPOINT_NAME) or "")
        known = self.sfm_endpoints.get(name)
        before = known.endpoint.properties.get(_INSTANCE) if known else None
        properties = line.conn.get_conn_properties()
        certified = properties.get(DriverParams.PEER_CN.value) == name
        if before and before != data.get(_INSTANCE) and certified and _lives(known.connections):
            here = str(properties.get(DriverParams.PEER_ADDR.value))
            there = str(known.endpoint.conn_props.get(DriverParams.PEER_ADDR.value))
            say(f"{name} is connected twice: from {there}, which stays, and from {here}, which is refused")
            reason = f"{name} is connected already, from {there}; this second process ends"
            line.send_dict(
                Types.READY, 1, {HandshakeKeys.ENDPOINT_NAME: self.local_endpoint.name, _REASON: reason}
            )
            time.sleep(0.5)  # so that the reason is read before the end
            line.conn.close()
            return
        update(self, line, data)

    return update_endpoint


def _lives(lines: list[Any]) -> bool:
    """Return whether one of the connections answers a ping: a machine that was switched off does not."""
    since = time.time()
    for line in list(lines):
        try:
            line.send_heartbeat(Types.PING)
        except Exception:  # FLARE raises several kinds for a closed connection
            continue
        while time.time() < since + PROBE_S:
            if line.last_activity > since:
                return True
            time.sleep(0.1)
    return False


def explain_peer(error: Exception) -> str:
    """Return why a handshake failed, as the server sees it."""
    text = str(getattr(error, "verify_message", "") or error)
    for sign, meaning in _SERVER_SEES:
        if sign.lower() in text.lower():
            return meaning
    return text


_SERVER_SEES = (
    ("alert certificate expired", "the peer says that this server's certificate has expired; renew it"),
    ("alert unknown ca", "the peer does not know this server's root: its kit is of another federation"),
    ("alert bad certificate", "the peer does not accept this server's certificate"),
    ("certificate has expired", "its certificate has expired; its owner renews it: splitft deploy renew KIT"),
    ("not yet valid", "its certificate is not valid yet; one of the two clocks is wrong"),
    ("self-signed certificate", "its certificate is from another root: a kit of another federation"),
    ("unable to get local issuer", "its certificate is from another root: a kit of another federation"),
    (
        "signature failure",
        "its certificate is from another root of the same name: a kit of an older federation",
    ),
    ("did not return a certificate", "it has no certificate"),
    ("http request", "it speaks HTTP, not TLS"),
    ("wrong version number", "it does not speak TLS"),
    ("timed out", "it did not finish the TLS handshake in time"),
    ("eof occurred", "it ended the TLS handshake; it may not trust this server's certificate"),
    ("reset by peer", "it ended the TLS handshake; it may not trust this server's certificate"),
)


# --- a site's side --------------------------------------------------------------------------------


def watch_client(kit: Path) -> None:
    """Say when this site is connected, and why it is not."""
    mine = secrets.token_hex(16)
    greet, update, close, register = (
        SfmConnection.send_handshake,
        ConnManager.update_endpoint,
        ConnManager.close_connection,
        FederatedClient.register,
    )

    def send_handshake(self: Any, frame_type: int) -> None:
        self.local_endpoint.properties = {**(self.local_endpoint.properties or {}), _INSTANCE: mine}
        greet(self, frame_type)

    def update_endpoint(self: Any, line: Any, data: dict[str, Any]) -> None:
        if reason := data.get(_REASON):
            say(f"{REFUSED} {reason}")
            os._exit(1)  # FLARE would try again for ever
        update(self, line, data)

    def close_connection(self: Any, connection: Any) -> None:
        line = self.sfm_conns.get(connection.name)
        if line is not None and line.sfm_endpoint is not None and line.sfm_endpoint.endpoint.name == _SERVER:
            say(f"{LOST} to the server")
        close(self, connection)

    def register_site(self: Any, fl_ctx: Any) -> Any:
        result = register(self, fl_ctx)
        if self.token:
            say(f"{CONNECTED} {self.client_name}")
        else:
            say(f"the server does not admit {self.client_name}; its log says why")
        return result

    SfmConnection.send_handshake, ConnManager.update_endpoint = send_handshake, update_endpoint
    ConnManager.close_connection, FederatedClient.register = close_connection, register_site
