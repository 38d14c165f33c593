"""Replicas of the server on threads of the test's process: the real ones, but they start at once."""

from __future__ import annotations

import os
import threading

from splitft.training.replicas import worker


class ReplicaThread:
    """A replica on a thread, joined by the pipes that a process has. Implements `process.Carrier`."""

    started: list[worker.ReplicaSetup] = []
    running: list[ReplicaThread] = []

    def __init__(self, setup: worker.ReplicaSetup, threads: int) -> None:
        their_requests, self.requests = _pipe()
        self.replies, their_replies = _pipe()
        arguments = (setup, their_requests, their_replies, lambda: None)
        self._thread = threading.Thread(target=worker.serve, args=arguments, daemon=True)
        self._thread.start()
        self.started.append(setup)
        self.running.append(self)

    def close(self) -> None:
        self.requests.close()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def fate(self) -> str:
        return "its thread has ended"


def _pipe():
    reads, writes = os.pipe()
    return os.fdopen(reads, "rb"), os.fdopen(writes, "wb")
