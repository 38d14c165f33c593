"""Several questions of one client underway at once, each on a lane of its own; answers in the order asked.

    lane 0   ask ----------> answer        the client works on what has come
    lane 1        ask -----------> answer  while the others are on their way

Only carrying goes on in other threads: what is asked, and what is made of the answers, is the client's own
one after the other, in an order that no line and no server can change.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from splitft.deploy.requests import RequestChannel


class Pipeline:
    """The questions of one client that are underway."""

    def __init__(self, lanes: Sequence[RequestChannel], patience_s: float) -> None:
        self._free, self._patience_s = deque(lanes), patience_s
        self._underway: deque[tuple[RequestChannel, Future[bytes]]] = deque()
        self._threads = ThreadPoolExecutor(len(lanes), thread_name_prefix="lane")

    def __len__(self) -> int:
        return len(self._underway)

    @property
    def full(self) -> bool:
        """Whether every lane waits for an answer."""
        return not self._free

    def ask(self, frame: bytes) -> None:
        """Send on a free lane; there must be one."""
        lane = self._free.popleft()
        self._underway.append((lane, self._threads.submit(lane.ask, frame, self._patience_s)))

    def answer(self) -> bytes:
        """The answer to the oldest question. Raises what `Lane.ask` raises."""
        lane, future = self._underway.popleft()
        try:
            return future.result()
        finally:
            self._free.append(lane)

    def settle(self) -> None:
        """Wait until every question has its answer, and forget them: a lane takes no other one before."""
        wait([future for _, future in self._underway])
        self._free.extend(lane for lane, _ in self._underway)
        self._underway.clear()

    def close(self) -> None:
        """No more questions; those that are underway may still end."""
        self._threads.shutdown(wait=False)
