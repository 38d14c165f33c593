"""A client's connection to the server in simulation, which serializes and counts every message.

    client --up--> bytes --> server          server --down--> bytes --> client

By default a message is written to bytes and read back with all checks. With `wire: {in_process: direct}` its
tensors are only encoded and decoded, which rounds them in the same way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Literal

from splitft.protocol import Message, MessageSerializer
from splitft.protocol.codec_state import CodecState
from splitft.protocol.serializer import ON_THE_CPU, Place
from splitft.tracking.events import Role, Traffic

Direction = Literal["up", "down"]
Tap = Callable[[str, Direction, bytes], None]
"""Called with every frame: client, direction, bytes. For recorders and audits."""


class Meter:
    """A counter of one client's bytes by direction and role."""

    def __init__(self) -> None:
        self._counts: dict[Direction, Counter[Role]] = {"up": Counter(), "down": Counter()}

    def count(
        self,
        direction: Direction,
        message: Message,
        payload_bytes: Mapping[str, int],
        nbytes: int | None = None,
    ) -> None:
        """Add the payload of each tensor to its role; the rest of `nbytes`, if given, to the main role."""
        sizes: Counter[Role] = Counter()
        for name, size in payload_bytes.items():
            sizes[message.ROLES[name.partition("/")[0]]] += size
        if nbytes is not None:
            sizes[message.main_role] += nbytes - sizes.total()  # prefix, headers and plain fields
        self._counts[direction].update(sizes)

    def traffic(self) -> Traffic:
        """Return the bytes since the last call."""
        counted = Traffic(up=dict(self._counts["up"]), down=dict(self._counts["down"]))
        self._counts = {"up": Counter(), "down": Counter()}
        return counted


class Channel:
    """One client's connection, with a counter of its bytes."""

    def __init__(
        self,
        client: str,
        serializer: MessageSerializer,
        tap: Tap | None = None,
        seed: int = 0,
        places: Mapping[str, Place] | None = None,
    ) -> None:
        """`places` say where `client` and `server` compute with what arrives; by default on the CPU."""
        self._client, self._serializer, self._tap = client, serializer, tap
        self._places = places or {"client": ON_THE_CPU, "server": ON_THE_CPU}
        self._meter = Meter()
        self.ends = {"client": CodecState(seed, client), "server": CodecState(seed, client)}
        """Memory of codecs at each end."""

    def up(self, message: Message) -> Message:
        """Send from the client; returns the message as the server receives it."""
        return self._pass(message, "up")

    def down(self, message: Message) -> Message:
        """Send from the server; returns the message as the client receives it."""
        return self._pass(message, "down")

    def traffic(self) -> Traffic:
        """Return the bytes since the last call."""
        return self._meter.traffic()

    def _pass(self, message: Message, direction: Direction) -> Message:
        sender, receiver = ("client", "server") if direction == "up" else ("server", "client")
        frame = self._serializer.pack(message, self.ends[sender])
        payload_bytes = frame.header.payload_bytes
        if self._serializer.wire.in_process == "direct":
            self._meter.count(direction, message, payload_bytes)
            return self._serializer.unpack(frame, self.ends[receiver], self._places[receiver])
        data = frame.to_bytes()
        if self._tap is not None:
            self._tap(self._client, direction, data)
        self._meter.count(direction, message, payload_bytes, len(data))
        return self._serializer.from_bytes(data, state=self.ends[receiver], place=self._places[receiver])
