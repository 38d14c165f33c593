"""Profiles: what is refused and how, presets as ratios, and a calibration that survives JSON."""

from __future__ import annotations

import json
import math

import pytest

from schedule.cases import DEVICE, SHAPE, SIZES
from splitft.errors import ScheduleError
from splitft.schedule.profile import (
    DEVICES,
    LINKS,
    SUSTAINED_SHARE,
    Calibration,
    Device,
    Link,
    ServerProfile,
    calibrated,
    device_preset,
    link_preset,
)
from splitft.schedule.sizes import sizes_of


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
    fast = DEVICE.scaled(2.0, "fast", memory_bytes=7.0)
    assert (fast.block_forward_s_per_token, fast.block_backward_s_per_token) == (0.5, 1.0)
    assert (fast.head_s_per_token, fast.name, fast.memory_bytes) == (0.25, "fast", 7.0)


def test_presets_have_sources_and_are_ordered_as_everyone_expects():
    assert all(len(preset.source) > 20 for preset in (*DEVICES.values(), *LINKS.values()))
    speeds = [DEVICES[name].peak_flops_per_s for name in ("phone", "laptop", "edge-gpu", "workstation")]
    assert speeds == sorted(speeds)
    assert [LINKS[name].up_bytes_per_s for name in ("lte", "dsl", "fibre", "lan")] == sorted(
        link.up_bytes_per_s for link in LINKS.values()
    )


def test_a_preset_without_measurement_comes_from_flops():
    phone = device_preset("phone", SIZES, context_tokens=10)
    flops = 2 * 1000 + 4 * 10 * 5  # 2 a parameter, 4 D for each of 5 positions seen on average
    assert phone.block_forward_s_per_token == flops / (SUSTAINED_SHARE * 2.8e12)
    assert phone.head_s_per_token == 4 * 10 * 100 / (SUSTAINED_SHARE * 2.8e12)


def test_a_preset_with_measurement_is_the_measurement_by_the_ratio_of_flops():
    measured = calibrated(DEVICE, SIZES, "tiny", "float32", 10)
    assert measured.flops_per_s == 2200
    phone = device_preset("phone", SIZES, measured=measured)
    ratio = SUSTAINED_SHARE * 2.8e12 / 2200
    assert phone.block_backward_s_per_token == DEVICE.block_backward_s_per_token / ratio
    assert phone.memory_bytes == DEVICES["phone"].memory_bytes


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(ScheduleError, match=r"no device 'labtop'.*did you mean 'laptop'"):
        device_preset("labtop", SIZES)
    with pytest.raises(ScheduleError, match=r"no link 'fiber'.*did you mean 'fibre'"):
        link_preset("fiber")


def test_a_calibration_survives_json_exactly():
    device = Device("here", 0.1, 1 / 3, 2e-7, math.inf, "timed")
    measured = Calibration(device, "tiny", "bfloat16", 128, 1e9 / 7)
    assert Calibration.from_json(measured.to_json()) == measured


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"device": {"name": "x"}}', '{"device": 3}'])
def test_what_is_not_a_calibration_is_refused(text):
    with pytest.raises(ScheduleError, match="not a calibration"):
        Calibration.from_json(text)


def test_a_calibration_with_impossible_numbers_is_refused():
    fields = json.loads(Calibration(DEVICE, "tiny", "float32", 10, 1.0).to_json())
    fields["device"]["head_s_per_token"] = -1
    with pytest.raises(ScheduleError, match="head_s_per_token is -1"):
        Calibration.from_json(json.dumps(fields))


def test_derived_sizes_are_those_of_a_known_model():
    sizes = sizes_of(SHAPE)
    # SmolLM2-135M has 134,515,008 parameters; norms are 61 x 576 of them
    total = sizes.embedding_parameters + 30 * sizes.block_parameters + 61 * 576
    assert total == 134_515_008
    assert sizes.adapter_parameters_per_rank == 2 * (576 + 576) + 2 * (576 + 192)
    assert sizes.head_parameters == 576  # tied: the matrix is the embedding
    assert sizes.output_parameters == 576 + 49152 * 576


def test_exact_counts_replace_derived_ones():
    sizes = sizes_of(SHAPE, block_parameters=7, head_parameters=0, kept_elements_per_token=5)
    assert (sizes.block_parameters, sizes.head_parameters, sizes.kept_elements_per_token) == (7, 0, 5)
    with pytest.raises(ScheduleError, match="block_parameters is 0"):
        sizes_of(SHAPE, block_parameters=0)


def test_a_family_without_gate_has_two_feed_forward_matrices():
    gated, plain = sizes_of(SHAPE), sizes_of(SHAPE.__class__(**{**SHAPE.__dict__, "family": "gpt2"}))
    assert gated.block_parameters - plain.block_parameters == 576 * 1536
