"""The process of one replica: started by the server, joined to it by two pipes, and gone when it is gone.

    server --stdin: arguments (pickled), then requests--> replica
           <--stdout: replies in the order of requests---
           <--stderr: a file, read if the replica dies---

The server may hand over several requests before it reads a reply, also to several replicas: they work at the
same time. When the server dies, even killed, the pipe ends and the replica exits. When the replica dies, the
server reads the end of its replies and raises ReplicaError.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import weakref
from collections import deque
from pathlib import Path
from typing import IO, Protocol

import torch

from splitft import errors
from splitft.errors import ReplicaError, SplitftError
from splitft.foreign_text import printable
from splitft.plugins import load, loaded
from splitft.training.replicas.packet import Packet, read_packet, write_packet
from splitft.training.replicas.worker import FAILED, ReplicaSetup, serve

START = "from splitft.training.replicas.process import main; main()"
LEAVE_S = 5.0
"""Seconds that a replica gets to exit before it is killed."""
LAST_WORDS = 300
"""Characters of a dead replica's stderr that are told."""


class Carrier(Protocol):
    """A running replica."""

    requests: IO[bytes]
    replies: IO[bytes]

    def close(self) -> None:
        """End it."""

    def fate(self) -> str:
        """Say how it has ended."""


class ReplicaProcess:
    """A replica in a process of its own. Implements `Carrier`."""

    def __init__(self, setup: ReplicaSetup, threads: int) -> None:
        """Start it with so many threads of the CPU; it loads its blocks meanwhile."""
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        paths = [path for path in (str(Path(errors.__file__).parents[1]), *sys.path) if path]
        self._process = subprocess.Popen(
            [sys.executable, "-c", START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.requests, self.replies = self._process.stdin, self._process.stdout
        self._end = weakref.finalize(self, _end, self._process, self._errors)
        with contextlib.suppress(OSError):  # the first reply will tell
            pickle.dump((loaded(), threads), self.requests)
            pickle.dump(setup, self.requests)
            self.requests.flush()

    def close(self) -> None:
        """End the process."""
        self._end()

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def fate(self) -> str:
        """Say how the process has ended, with the last line that it wrote to stderr."""
        try:
            status = self._process.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            return "it has closed its pipe"
        if status == -signal.SIGKILL:
            return "it was killed, as systems do when memory is short"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        said = f": {printable(lines[-1][:LAST_WORDS])}" if lines else ""
        return (f"signal {-status}" if status < 0 else f"exit status {status}") + said


class Replica:
    """One replica, as the server talks to it."""

    def __init__(self, name: str, carrier: Carrier) -> None:
        """Talk to a running replica; `name` is for errors."""
        self.name, self._carrier = name, carrier
        self._awaited: deque[tuple[int, bool]] = deque([(0, True)])  # tickets, and whether anybody asks
        self._results: dict[int, Packet] = {}
        self._tickets = 0  # ticket 0 is for the blocks to be loaded

    def await_ready(self) -> None:
        """Wait until the blocks are loaded. Raises what has kept it from that."""
        self.result(0)

    def post(self, request: Packet, answered: bool = True) -> int:
        """Hand over a request; return the ticket of its reply, which nobody asks for unless `answered`.

        Raises ReplicaError if the replica is gone.
        """
        self._tickets += 1
        try:
            write_packet(self._carrier.requests, request)
        except (OSError, ValueError) as error:
            raise self._gone() from error
        self._awaited.append((self._tickets, answered))
        return self._tickets

    def result(self, ticket: int) -> Packet:
        """Wait for a reply. Raises ReplicaError if the replica is gone, or the error of the request."""
        while ticket not in self._results:
            try:
                reply = read_packet(self._carrier.replies)
            except (EOFError, OSError, ValueError) as error:
                raise self._gone() from error
            known, answered = self._awaited.popleft()
            if answered:
                self._results[known] = reply
            elif reply.kind == FAILED:  # nobody would hear of it
                raise self._error(reply)
        reply = self._results.pop(ticket)
        if reply.kind == FAILED:
            raise self._error(reply)
        return reply

    def close(self) -> None:
        """End the replica."""
        self._carrier.close()

    def _gone(self) -> ReplicaError:
        return ReplicaError(
            f"{self.name} of the server has ended: {self._carrier.fate()}. Finished rounds are safe: go on "
            "with splitft train --resume, or splitft deploy submit; if memory was short, with fewer "
            "devices.server_replicas"
        )

    def _error(self, reply: Packet) -> Exception:
        """Return the error that a reply tells of, as one of ours where it is."""
        kind = getattr(errors, reply.fields["type"], None)
        if isinstance(kind, type) and issubclass(kind, SplitftError):
            return kind(reply.fields["text"])
        return RuntimeError(f"{self.name}: {reply.fields['type']}: {reply.fields['text']}")


def threads_each(count: int) -> int:
    """Return the threads of each of `count` replicas, which share those of this process."""
    return max(1, torch.get_num_threads() // count)


def main() -> None:
    """Run as a replica."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which closes the pipe
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between replies
    plugins, threads = pickle.load(requests)
    load(plugins)
    torch.set_num_threads(threads)
    serve(pickle.load(requests), requests, replies, at_end=lambda: os._exit(0))


def _end(process: subprocess.Popen[bytes], stderr: IO[bytes]) -> None:
    """Close the pipe, which ends the process; kill it if it lingers."""
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if stream is not None:
                stream.close()
    try:
        process.wait(LEAVE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    stderr.close()
