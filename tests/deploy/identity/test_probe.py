"""Why a site does not reach its server, over real TLS on this machine."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading

import pytest

pytest.importorskip("nvflare")

from deploy.identity.made_up import kit, signed
from splitft.deploy.identity import probe
from splitft.deploy.identity.probe import explain


@pytest.fixture(scope="module")
def roots():
    return signed("splitft"), signed("splitft")


@contextlib.contextmanager
def served(folder, own, root, answer=None):
    """A server with this certificate that asks for one of this root, as FLARE's does; its port."""
    folder = kit(folder, own, root, file="server")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=folder / "startup" / "rootCA.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(folder / "startup" / "server.crt", folder / "startup" / "server.key")
    listener = socket.create_server(("127.0.0.1", 0))

    def accept():
        with contextlib.suppress(OSError):
            while True:
                line, _ = listener.accept()
                with contextlib.suppress(ssl.SSLError, OSError):
                    if answer is not None:
                        answer(context, line)
                        continue
                    with context.wrap_socket(line, server_side=True) as secure:
                        secure.settimeout(5)
                        secure.recv(1)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()


@pytest.mark.parametrize(
    ("server", "site", "words"),
    [
        ({}, {}, None),
        ({"ends": -1}, {}, "certificate of the server .* has expired"),
        ({"begins": 1}, {}, "not valid yet"),
        ({"root": 1}, {}, "not of this kit's federation"),
        ({}, {"ends": -1}, "this kit's certificate has expired"),
        ({}, {"root": 1}, "does not accept this kit's certificate"),
    ],
)
def test_the_side_and_the_reason_are_named(tmp_path, roots, server, site, words):
    server, site = dict(server), dict(site)
    theirs = signed("server", roots[server.pop("root", 0)], **server)
    mine = signed("north", roots[site.pop("root", 0)], **site)
    with served(tmp_path / "server", theirs, roots[0]) as port:
        found = explain(kit(tmp_path / "north", mine, roots[0], port))
    if words is None:
        assert found is None
    else:
        assert re.search(words, found or ""), found


def test_a_server_that_ends_the_connection_after_the_certificate_may_have_revoked_it(tmp_path, roots):
    def close(context, line):
        context.wrap_socket(line, server_side=True).close()

    with served(tmp_path / "server", signed("server", roots[0]), roots[0], close) as port:
        assert "revoked" in explain(kit(tmp_path / "north", signed("north", roots[0]), roots[0], port))


def test_a_service_that_speaks_no_tls_is_said(tmp_path, roots):
    def greet(context, line):
        line.sendall(b"220 mail.example.org ready\r\n" * 10)
        line.close()

    with served(tmp_path / "server", signed("server", roots[0]), roots[0], greet) as port:
        found = explain(kit(tmp_path / "north", signed("north", roots[0]), roots[0], port))
    assert "does not speak TLS" in found


def test_a_port_that_nobody_listens_at_and_a_name_that_nobody_knows_are_said(tmp_path, roots):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    own = signed("north", roots[0])
    assert "refuses port" in explain(kit(tmp_path / "a", own, roots[0], port))
    assert "not known to this machine" in explain(kit(tmp_path / "b", own, roots[0], port, host="fl.invalid"))


def test_a_port_that_accepts_and_says_nothing_is_said(tmp_path, roots, monkeypatch):
    monkeypatch.setattr(probe, "TRY_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert "says nothing" in explain(kit(tmp_path / "a", signed("north", roots[0]), roots[0], port))
