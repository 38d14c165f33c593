"""A kit's process is kept running, and ended with all that it started."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import time

import pytest

from runs import started
from splitft.deploy.flare.poc import free_port
from splitft.deploy.flare.processes import Service, processes_of
from splitft.deploy.flare.provisioning import prepare_kit, provision
from splitft.errors import DeployError

pytest.importorskip("nvflare")


def until(true, seconds=40):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.2)
    assert true()


@pytest.mark.fault("a party's process dies", "its service starts it again")
def test_a_process_that_dies_is_started_again_and_sigterm_ends_all(tmp_path):
    kit = provision(tmp_path / "kits", "localhost", free_port(), ["north"]).of("localhost")
    command = started("deploy", "start", kit)
    until(lambda: processes_of(kit))
    first = processes_of(kit)[0].pid
    os.kill(first, signal.SIGKILL)
    until(lambda: any(one.pid != first for one in processes_of(kit)))
    command.terminate()
    command.communicate(timeout=40)
    assert command.returncode == 130
    assert not processes_of(kit)


def test_what_is_no_kit_is_said(tmp_path):
    with pytest.raises(DeployError, match="no startup kit"):
        prepare_kit(tmp_path)


def test_a_server_s_kit_keeps_its_jobs_to_itself(tmp_path):
    kit = provision(tmp_path / "kits", "localhost", free_port(), ["north"]).of("localhost")
    assert prepare_kit(kit) == "server"
    resources = (kit / "local" / "resources.json").read_text()
    assert "/tmp/nvflare" not in resources
    assert "splitft.deploy.flare.job." in resources
    assert '"*"' not in resources


@pytest.fixture
def server(tmp_path):
    """A running server of one federation, and the kits of another; its port."""
    port = free_port()
    ours = provision(tmp_path / "kits", "localhost", port, ["north"])
    theirs = provision(tmp_path / "other", "localhost", free_port(), ["north"])
    service = Service(ours.of("localhost"))
    service.start()
    try:
        until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        yield ours, theirs, port
    finally:
        service.stop()


def answers(root, port, kit=None) -> bool:
    """Whether the server keeps a TLS connection with this kit's certificate."""
    context = ssl.create_default_context(cafile=root.of("localhost") / "startup" / "rootCA.pem")
    if kit is not None:
        context.load_cert_chain(kit / "startup" / "client.crt", kit / "startup" / "client.key")
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as plain:
            with context.wrap_socket(plain, server_hostname="localhost") as line:
                line.settimeout(2)
                return bool(line.recv(1))
    except TimeoutError:
        return True  # it waits for us to speak
    except (ssl.SSLError, ConnectionError):
        return False


@pytest.mark.hostile(
    "somebody connects without a certificate of the federation",
    "the TLS handshake fails, nothing is answered",
)
def test_without_a_certificate_of_the_federation_nothing_is_answered(server):
    ours, theirs, port = server
    assert answers(ours, port, ours.of("north"))
    assert not answers(ours, port)
    assert not answers(ours, port, theirs.of("north"))
