"""Connections that may not be, to a real server process: each is refused at once, and both sides are told."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import time

import pytest

pytest.importorskip("nvflare")

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from deploy.identity.made_up import Signed, kit, signed
from runs import invoke, started
from splitft.deploy.flare import running
from splitft.deploy.flare.poc import free_port
from splitft.deploy.flare.processes import CONSOLE, Service, processes_of
from splitft.deploy.flare.provisioning import AUTHORITY, provision
from splitft.deploy.flare.running import Reporter, keep_running
from splitft.deploy.identity.certificates import certificate_of
from splitft.deploy.identity.probe import explain
from splitft.deploy.identity.revocation import REVOKED, revoke
from splitft.errors import DeployError


class Federation:
    """A server that runs, its kits, and what it has told its operator."""

    def __init__(self, folder):
        self.port = free_port()
        self.kits = provision(folder / "kits", "localhost", self.port, ["north", "south"])
        self.server = self.kits.of("localhost")
        self.service = Service(self.server)
        self.reporter = Reporter(self.service, lambda line: self.said.append(line))
        self.said: list[str] = []

    def told(self, words: str, seconds: float = 20.0) -> str:
        """Wait until the server's operator is told a line with these words."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.reporter.report()
            if found := [line for line in self.said if words in line]:
                return found[-1]
            time.sleep(0.1)
        raise AssertionError(
            f"{words!r} was not said: {self.said}\n{(self.server / CONSOLE).read_text()[-2000:]}"
        )

    def connect(self, kit):
        """A TLS connection with the certificate of a kit."""
        context = ssl.create_default_context(cafile=self.server / "startup" / "rootCA.pem")
        context.check_hostname = False
        context.load_cert_chain(kit / "startup" / "client.crt", kit / "startup" / "client.key")
        line = context.wrap_socket(socket.create_connection(("127.0.0.1", self.port), timeout=5))
        line.settimeout(10)
        return line


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    made = Federation(tmp_path_factory.mktemp("connections"))
    made.service.start()
    try:
        until = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", made.port)) and time.monotonic() < until:
            time.sleep(0.2)
        yield made
    finally:
        made.service.stop()


def alive(line) -> bool:
    """Whether the server waits for us to speak, and has not ended the connection."""
    line.settimeout(3)
    try:
        return bool(line.recv(1))
    except TimeoutError:
        return True
    except (ssl.SSLError, ConnectionError):
        return False


def root_of_authority(federation) -> Signed:
    folder = federation.kits.folder / AUTHORITY
    return Signed(
        x509.load_pem_x509_certificate((folder / "rootCA.pem").read_bytes()),
        load_pem_private_key((folder / "rootCA.key").read_bytes(), None),
    )


def test_a_certificate_of_the_federation_is_admitted_and_its_site_reaches_the_server(federation):
    assert alive(federation.connect(federation.kits.of("north")))
    assert explain(federation.kits.of("north")) is None


@pytest.mark.fault("a site's certificate has expired", "both sides say so, with the day")
def test_an_expired_certificate_is_said_at_once_on_both_sides(federation, tmp_path):
    root = root_of_authority(federation)
    old = kit(tmp_path / "old", signed("north", root, ends=-1), root, federation.port)
    assert "this kit's certificate has expired" in explain(old)
    assert "from 127.0.0.1" in federation.told("its certificate has expired")
    done = invoke("deploy", "start", old)
    assert done.exit_code == 2
    assert "expired" in done.stderr


@pytest.mark.fault("a site starts the kit of another federation", "both sides say so")
def test_a_kit_of_another_federation_is_said_at_once_on_both_sides(federation, tmp_path):
    theirs = signed("splitft")
    stranger = kit(tmp_path / "stranger", signed("north", theirs), theirs, federation.port)
    assert "not of this kit's federation" in explain(stranger)
    federation.told("its kit is of another federation")


@pytest.mark.fault("a peer connects and says nothing", "others are admitted")
def test_a_peer_that_says_nothing_keeps_nobody_out(federation):
    silent = [socket.create_connection(("127.0.0.1", federation.port)) for _ in range(3)]
    began = time.monotonic()
    assert explain(federation.kits.of("north")) is None
    assert time.monotonic() - began < 9  # they have ten seconds
    for line in silent:
        line.close()


@pytest.mark.hostile("somebody speaks no TLS to the server", "refused and said at the server")
def test_what_speaks_no_tls_is_said_at_the_server(federation):
    with socket.create_connection(("127.0.0.1", federation.port)) as line:
        line.sendall(b"GET / HTTP/1.1\r\n\r\n")
        federation.told("it speaks HTTP")


@pytest.mark.hostile("a site with a revoked certificate", "cut off and refused, without a restart")
def test_a_revoked_certificate_is_cut_off_and_refused_without_a_restart(federation):
    site = federation.kits.of("south")
    line = federation.connect(site)
    assert alive(line)
    revoke(federation.server / "local" / REVOKED, "south", [certificate_of(site).fingerprint])
    federation.told("the connection of south is closed: its certificate was revoked")
    assert not alive(line)
    assert "revoked" in explain(site)
    federation.told("refused: the certificate of south was revoked")
    assert alive(federation.connect(federation.kits.of("north")))


@pytest.mark.hostile("the list of revoked certificates is damaged", "the last good list holds; it is said")
def test_a_damaged_list_of_revoked_certificates_does_not_let_them_in(federation):
    path = federation.server / "local" / REVOKED
    revoke(path, "south", [certificate_of(federation.kits.of("south")).fingerprint])
    time.sleep(2.5)
    before = path.read_text()
    path.write_text("{")
    federation.told("until then the list read before holds")
    assert "revoked" in explain(federation.kits.of("south"))
    path.write_text(before)


def test_a_certificate_that_ends_soon_is_warned_of_at_the_server(federation, tmp_path):
    root = root_of_authority(federation)
    soon = kit(tmp_path / "soon", signed("west", root, ends=10), root, federation.port)
    assert alive(federation.connect(soon))
    federation.told("the certificate of west ends in 10 days")


@pytest.mark.slow
@pytest.mark.fault(
    "two processes under the name of one site", "the second ends with the reason, the first stays"
)
def test_a_second_process_under_one_name_ends_with_the_reason_and_the_first_stays(federation, tmp_path):
    first = started("deploy", "start", federation.kits.of("north"))
    try:
        wait_for(federation.kits.of("north"), "connected as north")
        second = tmp_path / "copied"
        shutil.copytree(federation.kits.of("north"), second)
        (second / CONSOLE).unlink()
        done = started("deploy", "start", second)
        _, errors = done.communicate(timeout=60)
        assert done.returncode == 2, errors
        assert "north is connected already, from 127.0.0.1" in errors
        federation.told("north is connected twice")
        assert first.poll() is None
        assert "lost" not in (federation.kits.of("north") / CONSOLE).read_text()
    finally:
        first.terminate()
        first.communicate(timeout=60)


def wait_for(kit, words, seconds=60):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            if words in (kit / CONSOLE).read_text():
                return
        time.sleep(0.2)
    raise AssertionError(words)


def test_a_site_without_a_server_is_told_why_and_that_its_certificate_ends(federation, tmp_path, monkeypatch):
    folder, root = tmp_path / "north", root_of_authority(federation)
    shutil.copytree(federation.kits.of("north"), folder, ignore=shutil.ignore_patterns("*.txt"))
    called = folder / "startup" / "fed_client.json"
    called.write_text(called.read_text().replace(str(federation.port), str(free_port())))
    soon = signed("north", root, ends=5)
    (folder / "startup" / "client.crt").write_bytes(soon.pem())
    (folder / "startup" / "client.key").write_bytes(soon.key_pem())
    monkeypatch.setattr(running, "EXPLAIN_S", 0.0)
    said: list[str] = []

    def tell(line):
        said.append(line)
        if len(said) == 2:
            raise DeployError("enough")

    with pytest.raises(DeployError, match="enough"):
        keep_running(folder, tell)
    assert "not connected: localhost refuses port" in said[0]
    assert "the certificate of north ends in 5 days" in said[1]
    assert processes_of(folder) == []
