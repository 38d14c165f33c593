"""Profiles of machines and links: the numbers that are refused, and machines of another speed."""

from __future__ import annotations

import math

import pytest

from schedule.cases import DEVICE
from splitft.errors import ScheduleError
from splitft.schedule.profile import Device, Link, ServerProfile


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_a_link_without_bandwidth_is_refused(rate):
    with pytest.raises(ScheduleError, match=r"link 'x': up_bytes_per_s is .*above 0"):
        Link("x", rate, 1.0, 0.0)
    with pytest.raises(ScheduleError, match=r"link 'x': down_bytes_per_s is .*above 0"):
        Link("x", 1.0, rate, 0.0)


@pytest.mark.parametrize("latency_s", [-0.1, math.nan, math.inf])
def test_a_latency_is_a_number_of_at_least_nothing(latency_s):
    with pytest.raises(ScheduleError, match=r"latency_s is .*at least 0"):
        Link("x", 1.0, 1.0, latency_s)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_a_device_has_speed_and_memory(bad):
    with pytest.raises(ScheduleError, match=r"device 'x': block_backward_s_per_token is .*above 0"):
        Device("x", 1.0, bad, 1.0, 1.0)
    with pytest.raises(ScheduleError, match=r"device 'x': memory_bytes is .*above 0"):
        Device("x", 1.0, 1.0, 1.0, bad)
    with pytest.raises(ScheduleError, match="speed relative to device 'laptop'"):
        DEVICE.scaled(bad)


def test_a_server_has_no_negative_overhead():
    with pytest.raises(ScheduleError, match="group_overhead_s is -1; it must be a number of at least 0"):
        ServerProfile(DEVICE, group_overhead_s=-1)


def test_a_device_twice_as_fast_takes_half_the_seconds():
    fast = DEVICE.scaled(2.0)
    assert (fast.block_forward_s_per_token, fast.block_backward_s_per_token) == (0.5, 1.0)
    assert (fast.head_s_per_token, fast.memory_bytes) == (0.25, DEVICE.memory_bytes)
