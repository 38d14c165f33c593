"""A client's connection to the server in simulation: every message passes through it and is counted.

    client --up--> bytes --> server          server --down--> bytes --> client

By default a message really becomes bytes and is read back from them, checks and all. With
`wire: {in_process: direct}` its tensors are rounded as the wire would round them, and no bytes are made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Literal

from splitft.protocol import Message, MessageSerializer
from splitft.protocol.codec_state import CodecState
from splitft.tracking.events import Role, Traffic

Direction = Literal["up", "down"]
Tap = Callable[[str, Direction, bytes], None]
"""Told of every frame: client, direction, bytes. For recorders and audits."""


class Meter:
    """Counts one client's bytes by direction and role."""

    def __init__(self) -> None:
        self._counts: dict[Direction, Counter[Role]] = {"up": Counter(), "down": Counter()}

    def count(
        self, direction: Direction, message: Message, payload: Mapping[str, int], nbytes: int | None = None
    ) -> None:
        """Add a message by the bytes of its tensors; of `nbytes` in all, the rest goes to its main role."""
        sizes: Counter[Role] = Counter()
        for name, size in payload.items():
            sizes[message.ROLES[name.partition("/")[0]]] += size
        if nbytes is not None:
            sizes[message.main_role] += nbytes - sizes.total()  # prefix, headers and plain fields
        self._counts[direction].update(sizes)

    def traffic(self) -> Traffic:
        """Bytes since this was asked last."""
        counted = Traffic(up=dict(self._counts["up"]), down=dict(self._counts["down"]))
        self._counts = {"up": Counter(), "down": Counter()}
        return counted


class Channel:
    """One client's metered line."""

    def __init__(self, client: str, terms: MessageSerializer, tap: Tap | None = None, seed: int = 0) -> None:
        self._client, self._terms, self._tap = client, terms, tap
        self._meter = Meter()
        self.ends = {"client": CodecState(seed, client), "server": CodecState(seed, client)}
        """What each end remembers for codecs that learn."""

    def up(self, message: Message) -> Message:
        """From the client to the server, as the server sees it."""
        return self._pass(message, "up")

    def down(self, message: Message) -> Message:
        """From the server to the client, as the client sees it."""
        return self._pass(message, "down")

    def traffic(self) -> Traffic:
        """Bytes since this was asked last."""
        return self._meter.traffic()

    def _pass(self, message: Message, direction: Direction) -> Message:
        sender, receiver = ("client", "server") if direction == "up" else ("server", "client")
        frame = self._terms.pack(message, self.ends[sender])
        payload = {name: encoded.nbytes for name, encoded in frame.tensors.items()}
        if self._terms.wire.in_process == "direct":
            self._meter.count(direction, message, payload)
            return self._terms.unpack(frame, self.ends[receiver])
        data = frame.to_bytes()
        if self._tap is not None:
            self._tap(self._client, direction, data)
        self._meter.count(direction, message, payload, len(data))
        return self._terms.from_bytes(data, streams=self.ends[receiver])
