"""Time in which the process was stopped does not count, and all other time does."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import time

import pytest
from splitft.deploy.server import uptime
uptime.PAUSE_S = 1.0
clock = uptime.Uptime()
began, wall = clock.now(), time.monotonic()
print("running", flush=True)
input()
print(clock.now() - began, time.monotonic() - wall, clock.paused_s, flush=True)
"""


def test_a_process_that_was_stopped_does_not_count_that_time():
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "running\n"
    time.sleep(1.5)
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    said, _ = process.communicate("\n", timeout=30)
    up, passed, paused = map(float, said.split())
    assert passed - up == pytest.approx(paused, abs=0.1)
    assert 2.4 < paused < 4.5
    assert up > 1.0
