"""Machines for a test: network namespaces of this one, each with a line of its own to the first.

    hub 10.86.N.1 ---- 10.86.N.2 north          a line can be cut, as a cable that is pulled out
        10.86.M.1 ---- 10.86.M.2 south          north and south do not reach each other

It takes root and iproute2; where they are not, tests are skipped.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HOSTS = Path("/etc/netns")
"""Files that `ip netns exec` puts in place of those of /etc."""


@dataclass(frozen=True)
class Machines:
    """The hub and those that reach it."""

    hub: str
    others: tuple[str, ...]
    tag: str

    def on(self, name: str) -> tuple[str, ...]:
        """What to put before a command, so that it runs on this machine."""
        return ("ip", "netns", "exec", self._space(name))

    def cut(self, name: str, seconds: float) -> None:
        """Pull the cable of a machine for so long."""
        _ip("-n", self._space(self.hub), "link", "set", self._line(name), "down")
        time.sleep(seconds)
        _ip("-n", self._space(self.hub), "link", "set", self._line(name), "up")

    def _space(self, name: str) -> str:
        return f"spl-{self.tag}-{name}"

    def _line(self, name: str) -> str:
        return f"h{self.tag}{self.others.index(name)}"


@contextlib.contextmanager
def machines(hub: str, others: Sequence[str], host: str) -> Iterator[Machines]:
    """Make them; all know the hub as `host`. Raises OSError or CalledProcessError where that cannot be."""
    made = Machines(hub, tuple(others), str(os.getpid() % 10**6))
    first = os.getpid() % 120 * 2
    try:
        for name in (hub, *others):
            _ip("netns", "add", made._space(name))
            _ip("-n", made._space(name), "link", "set", "lo", "up")
            (HOSTS / made._space(name)).mkdir(parents=True)
        _knows(made._space(hub), "127.0.0.1", host)
        for number, name in enumerate(others):
            net, ends = f"10.86.{first + number}", (made._line(name), f"o{made.tag}{number}")
            _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for space, end, last in ((hub, ends[0], 1), (name, ends[1], 2)):
                _ip("link", "set", end, "netns", made._space(space))
                _ip("-n", made._space(space), "addr", "add", f"{net}.{last}/24", "dev", end)
                _ip("-n", made._space(space), "link", "set", end, "up")
            _knows(made._space(name), f"{net}.1", host)
        yield made
    finally:
        for name in (hub, *others):
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                _ip("netns", "del", made._space(name))
            shutil.rmtree(HOSTS / made._space(name), ignore_errors=True)


def possible() -> bool:
    """Whether this machine lets us make such machines."""
    try:
        with machines("a", ["b"], "example.org") as made:
            subprocess.run([*made.on("b"), "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def _knows(space: str, address: str, host: str) -> None:
    text = f"127.0.0.1 localhost\n{address} {host}\n"
    (HOSTS / space / "hosts").write_text(text, encoding="utf-8")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
