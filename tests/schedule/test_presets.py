"""Presets of machines and links: their sources, their order, and devices derived from operations."""

from __future__ import annotations

from typing import get_args

import pytest

from schedule.cases import SIZES
from splitft.errors import ScheduleError
from splitft.schedule.presets import DEVICES, LINKS, SUSTAINED_SHARE, device_preset, link_preset
from splitft.specs import DeviceName, LinkName


def test_the_configuration_names_every_preset():
    assert set(get_args(DeviceName)) == {*DEVICES, "measured"}
    assert set(get_args(LinkName)) == set(LINKS)


def test_presets_have_sources_and_are_ordered_as_everyone_expects():
    assert all(len(preset.source) > 20 for preset in (*DEVICES.values(), *LINKS.values()))
    speeds = [DEVICES[name].peak_flops_per_s for name in ("phone", "laptop", "edge-gpu", "workstation")]
    assert speeds == sorted(speeds)
    assert [LINKS[name].up_bytes_per_s for name in ("lte", "dsl", "fibre", "lan")] == sorted(
        link.up_bytes_per_s for link in LINKS.values()
    )


def test_the_seconds_of_a_preset_come_from_operations():
    phone = device_preset("phone", SIZES, context_tokens=10)
    flops = 2 * 1000 + 4 * 10 * 5  # 2 a parameter, 4 D for each of 5 positions seen on average
    assert phone.block_forward_s_per_token == flops / (SUSTAINED_SHARE * 2.8e12)
    assert phone.head_s_per_token == 4 * 10 * 100 / (SUSTAINED_SHARE * 2.8e12)


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(ScheduleError, match=r"no device 'labtop'.*did you mean 'laptop'"):
        device_preset("labtop", SIZES)
    with pytest.raises(ScheduleError, match=r"no link 'fiber'.*did you mean 'fibre'"):
        link_preset("fiber")
