"""A model hub on this machine that speaks the protocol of the Hugging Face hub.

    HEAD, GET  hub:      /owner/name/resolve/REVISION/FILE  -> 200 (small file) or 302 (weights)
    GET        content:  /COMMIT/FILE, Range: bytes=a-b         -> 206

As there, weights lie on a content server of another address, which refuses the token of the hub; commits
never change; a missing file is a 404 with a code. What goes out is recorded; connections break on demand.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from huggingface_hub import constants

from splitft.model.weights import ranges

TOKEN = "hf_of_this_test"


@dataclass(frozen=True)
class Sent:
    """One answer of the content server."""

    file: str
    start: int
    stop: int
    sent: int
    """Bytes of [start, stop) that went out before the connection broke."""


@dataclass
class LocalHub:
    """The hub, its repository and what it was asked for."""

    repo: str
    commits: dict[str, Path] = field(default_factory=dict)
    """Commit -> folder with its files; the last one is `main`."""
    private: bool = False
    """Whether it answers only those with the token."""
    ranges: bool = True
    """Whether the content server knows ranges."""
    shift: int = 0
    """Bytes by which the content server misses the range that was asked for."""
    breaks: list[int] = field(default_factory=list)
    """Bytes after which the next connections of the content server break."""
    asked: list[str] = field(default_factory=list)
    """Files that were asked for, at the hub."""
    sent: list[Sent] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    """Addresses that it does not know."""
    leaked: list[str] = field(default_factory=list)
    """Tokens that came to the content server."""
    stalled: threading.Event = field(default_factory=threading.Event)
    """Set when a connection has stopped in the middle; it waits for `go_on`."""
    stall_after: int | None = None
    go_on: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    content_url: str = ""

    def push(self, folder: Path) -> str:
        """Make a folder the newest commit."""
        commit = hashlib.sha1(str(folder).encode()).hexdigest()
        self.commits.pop(commit, None)
        self.commits[commit] = folder
        return commit

    def folder(self, revision: str) -> tuple[str, Path] | None:
        if revision == "main":
            return list(self.commits.items())[-1]
        return (revision, self.commits[revision]) if revision in self.commits else None

    def bytes_of(self, file: str) -> int:
        """Bytes of a file that went out."""
        return sum(one.sent for one in self.sent if one.file == file)


@contextmanager
def running(repo: str, folder: Path) -> Iterator[LocalHub]:
    """Serve a folder as the newest commit of a repository."""
    hub = LocalHub(repo)
    hub.push(folder)
    servers = []
    for handler, name in ((_Hub, "url"), (_Content, "content_url")):
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        server.hub = hub
        setattr(hub, name, f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
    try:
        yield hub
    finally:
        hub.go_on.set()
        for server in servers:
            server.shutdown()
            server.server_close()


def visit(hub: LocalHub, folder: Path, monkeypatch) -> None:
    """Make this process a client of the hub, with empty caches in `folder`."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub-cache"))
    monkeypatch.setattr(ranges, "PAUSE_S", 0.0)
    monkeypatch.setenv("SPLITFT_CACHE", str(folder / "splitft-cache"))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> LocalHub:
        return self.server.hub

    def log_message(self, *arguments) -> None:
        pass

    def answer(self, status: int, headers: Mapping[str, object] = {}, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


class _Hub(_Handler):
    def do_GET(self) -> None:
        hub = self.hub
        if hub.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
            return
        if match := re.match(rf"/api/models/{re.escape(hub.repo)}/tree/([^/?]+)(/[^?]*)?", self.path):
            self._tree(match[1], match[2])
            return
        match = re.fullmatch(rf"/{re.escape(hub.repo)}/resolve/([^/]+)/(.+)", self.path)
        found = hub.folder(match[1]) if match else None
        if match is None or found is None:
            hub.unknown.append(self.path)
            self.answer(404, {"X-Error-Code": "RevisionNotFound" if match else "RepoNotFound"})
            return
        (commit, folder), file = found, match[2]
        hub.asked.append(file)
        path = folder / file
        if not path.is_file():
            self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        data = path.read_bytes()
        if file.endswith(".safetensors"):
            etag = hashlib.sha256(data).hexdigest()
            headers = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": len(data), "X-Repo-Commit": commit}
            place = f"{hub.content_url}/{commit}/{file}"
            self.answer(302, {**headers, "Location": place})
        else:
            etag = hashlib.sha1(data).hexdigest()
            self.answer(
                200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Content-Length": len(data)}, data
            )

    def _tree(self, revision: str, folder: str | None) -> None:
        """List the files of a commit; there are no folders in it."""
        found = self.hub.folder(revision)
        if found is None or folder:
            self.answer(404, {"X-Error-Code": "EntryNotFound"})
            return
        entries = [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0" * 40}
            for path in found[1].iterdir()
        ]
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(entries).encode())

    do_HEAD = do_GET  # noqa: N815


class _Content(_Handler):
    def do_GET(self) -> None:
        hub = self.hub
        if "Authorization" in self.headers:
            hub.leaked.append(self.headers["Authorization"])
            self.answer(400)
            return
        commit, file = self.path[1:].split("/")
        data = (hub.commits[commit] / file).read_bytes()
        start, stop, status = 0, len(data), 200
        if hub.ranges and (match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))):
            start, stop, status = int(match[1]) + hub.shift, min(int(match[2]) + 1, len(data)), 206
            if start >= len(data):
                self.answer(416)
                return
        self.send_response(status)
        self.send_header("Content-Length", str(stop - start))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.end_headers()
        self._send(file, data, start, stop)

    def _send(self, file: str, data: bytes, start: int, stop: int) -> None:
        hub = self.hub
        limit = hub.breaks.pop(0) if hub.breaks else None
        broken = limit is not None and limit < stop - start
        out = data[start : start + limit] if broken else data[start:stop]
        if hub.stall_after is not None and len(out) > hub.stall_after:
            self.wfile.write(out[: hub.stall_after])
            self.wfile.flush()
            hub.sent.append(Sent(file, start, stop, hub.stall_after))
            hub.stalled.set()
            hub.go_on.wait(60)
            self.close_connection = True
            return
        hub.sent.append(Sent(file, start, stop, len(out)))
        self.wfile.write(out)
        if broken:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
