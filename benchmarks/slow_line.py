"""A TCP proxy on loopback that adds delay, limits the rate and simulates outages, for `far_sites.py` and
tests.

    site --> proxy: delays each chunk by half a round trip, and limits the rate --> server

The delay is exact for each chunk; the rate is that of one connection in each direction. In an outage nothing
passes and nothing is lost, because TCP retransmits. Loss and jitter are not emulated.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Coroutine
from typing import Any

CHUNK = 2**16


class SlowLine:
    """A proxy that listens on its own port and forwards to another."""

    def __init__(self, to_port: int) -> None:
        self._to, self.round_trip_s, self.bytes_per_s = to_port, 0.0, float("inf")
        self.cut_until = 0.0
        """End of the outage on the monotonic clock; until then nothing passes, and new connections are
        refused."""
        self.carried = 0
        """Bytes so far, in both directions."""
        self._writers: set[asyncio.StreamWriter] = set()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def pull(self, seconds: float) -> None:
        """Start an outage in which connections stay open and nothing passes."""
        self.cut_until = time.monotonic() + seconds

    def sever(self, seconds: float) -> None:
        """Start an outage and close every connection, as a router that restarts does."""
        self.pull(seconds)
        self._loop.call_soon_threadsafe(self._break)

    def close(self) -> None:
        """Stop listening."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._socket.close()

    # ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(asyncio.start_server(self._connect, sock=self._socket))
        self._loop.run_forever()

    def _break(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if time.monotonic() < self.cut_until:
            writer.transport.abort()
            return
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.close()
            return
        self._writers |= {writer, back}
        try:
            await _both(self._pump(reader, back), self._pump(there, writer))
        finally:
            self._writers -= {writer, back}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def take() -> None:
            free = 0.0
            with contextlib.suppress(OSError):
                while data := await reader.read(CHUNK):
                    self.carried += len(data)
                    now = self._loop.time()
                    free = max(now, free) + len(data) / self.bytes_per_s
                    await queue.put((free + self.round_trip_s / 2, data))
            await queue.put((0.0, b""))

        taking = asyncio.ensure_future(take())
        with contextlib.suppress(OSError):
            while True:
                due, data = await queue.get()
                if not data:
                    break
                if (wait := max(due, self.cut_until) - self._loop.time()) > 0:
                    await asyncio.sleep(wait)
                writer.write(data)
                await writer.drain()
        taking.cancel()
        writer.close()


async def _both(*ways: Coroutine[Any, Any, None]) -> None:
    await asyncio.gather(*ways, return_exceptions=True)
