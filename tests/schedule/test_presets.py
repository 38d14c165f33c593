"""Presets of machines and links, held against published facts, and the devices that are derived from them."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from schedule.cases import SIZES
from splitft.adapters import attach
from splitft.errors import ScheduleError
from splitft.geometry import Span
from splitft.model import open_model
from splitft.schedule.presets import (
    BLOCK_LAUNCHES,
    DEVICES,
    LINKS,
    SUSTAINED_SHARE,
    device_preset,
    link_preset,
)
from splitft.specs import DeviceName, LinkName, LoraSpec, ModelSpec
from splitft.training.ranks import RankPolicy

# units, multiply-adds of a unit and clock, clock in GHz, TFLOP/s as published; GB in all, GB for others
MACHINES = {
    "phone": (1536, 1, 0.903, 2.8, 12, 8),  # Adreno 750: FP32 units
    "laptop": (10 * 128, 1, 1.398, 3.6, 16, 8),  # Apple M2: 10 cores of 128 FP32 units
    "edge-gpu": (
        64,
        256,
        1.3,
        170 // 4,
        32,
        8,
    ),  # Orin: 64 tensor cores, 170 TOPS sparse INT8: 1/4 dense FP16
    "workstation": (328, 64, 1.695, 71, 24, 2),  # RTX 3090: tensor cores, BF16 with FP32 sums, boost clock
    "server-gpu": (432, 256, 1.41, 312, 80, 2),  # A100: tensor cores, BF16, boost clock
}
# Mbit/s up, Mbit/s down, ms there and back
CONNECTIONS = {
    "lte": (8, 30, 50), "dsl": (10, 50, 20), "fibre": (100, 300, 10), "lan": (1000, 1000, 0.5),
}  # fmt: skip
CUDA_US = 7 + 3  # an operator with gradients (pytorch issue 41383), and the driver
LAUNCHES_US = {
    "phone": (24 + 36) / 2,  # arXiv 2604.02344: WebGPU over Vulkan
    "laptop": 20,  # pytorch issue 148219: MPS on an M1 Pro
    "edge-gpu": 2 * CUDA_US, "workstation": CUDA_US, "server-gpu": CUDA_US,
}  # fmt: skip


def test_every_preset_is_held_against_its_source():
    assert set(MACHINES) == set(LAUNCHES_US) == set(DEVICES)
    assert set(CONNECTIONS) == set(LINKS)


@pytest.mark.parametrize("name", MACHINES)
def test_the_peak_is_the_published_one_and_that_of_units_clock_and_two_operations(name):
    units, each, gigahertz, published, _, _ = MACHINES[name]
    assert DEVICES[name].peak_flops_per_s == pytest.approx(published * 1e12, rel=1e-12)
    assert DEVICES[name].peak_flops_per_s == pytest.approx(units * each * 2 * gigahertz * 1e9, rel=0.015)


@pytest.mark.parametrize("name", MACHINES)
def test_the_memory_is_the_machines_without_the_part_of_other_programs(name):
    *_, whole, others = MACHINES[name]
    assert DEVICES[name].memory_bytes == (whole - others) * 1e9
    assert f"{whole - others} of {whole} GB" in DEVICES[name].source


@pytest.mark.parametrize("name", CONNECTIONS)
def test_links_have_the_rates_and_delays_of_their_source(name):
    up, down, round_trip_ms = CONNECTIONS[name]
    link = LINKS[name]
    assert (link.up_bytes_per_s, link.down_bytes_per_s) == (up * 1e6 / 8, down * 1e6 / 8)
    assert link.latency_s == round_trip_ms / 2 / 1e3


@pytest.mark.parametrize("name", LAUNCHES_US)
def test_launches_take_the_microseconds_of_their_source(name):
    assert DEVICES[name].launch_us == LAUNCHES_US[name]
    assert len(DEVICES[name].launch_source) > 20


class Kernels(TorchDispatchMode):
    """A count of the operators that would each launch a kernel on a GPU: those that are not views."""

    VIEWS = frozenset((
        "alias", "as_strided", "detach", "expand", "permute", "reshape", "select", "slice", "split",
        "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_reshape_alias", "_unsafe_view",
    ))  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name.partition("::")[2]
        self.count[name] += name not in self.VIEWS
        return operator(*args, **(kwargs or {}))


def _kernels(model, ranks, span) -> tuple[int, int]:
    """Kernels of a forward and of a backward pass over these blocks."""
    segment = model.segment(span)
    bank = attach(segment.blocks, ranks.lora.targets, ranks.scale, model.dtype)
    bank.put(
        "c", ranks.start({key: size for key, size in bank.sizes.items() if key[0] in span}, torch.float32)
    )
    hidden = torch.randn(2, 8, model.shape.width).to(model.dtype).requires_grad_()
    with Kernels() as forward, bank.routed([("c", 2)]):
        result = segment.run(hidden, span)
    with Kernels() as backward:
        torch.autograd.backward([result], [torch.ones_like(result)])
    return forward.count.total(), backward.count.total()


def test_a_block_launches_the_kernels_that_were_counted(tiny_llama):
    """The difference of three blocks and one, so that what a pass does once is not counted."""
    model = open_model(ModelSpec(name=str(tiny_llama), dtype="bfloat16"))
    ranks = RankPolicy(LoraSpec(rank=4, rank_at_cut=None), model.shape.blocks, "svd", 0)
    one, three = (_kernels(model, ranks, Span(1, 1 + blocks)) for blocks in (1, 3))
    of_a_block = sum(three) - sum(one)  # forward and backward of two blocks
    assert of_a_block / 4 == pytest.approx(BLOCK_LAUNCHES, rel=0.1)


def test_launch_overhead_is_left_out_unless_a_multiple_is_given():
    assert device_preset("server-gpu", SIZES).block_overhead_s == 0
    four_times = device_preset("server-gpu", SIZES, launch_overhead=4)
    assert four_times.block_overhead_s == pytest.approx(4 * BLOCK_LAUNCHES * 10e-6)
    assert "4 x 81 launches of 10 us a block" in four_times.source
    assert device_preset("phone", SIZES, launch_overhead=1).block_overhead_s == pytest.approx(81 * 30e-6)


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
    assert SUSTAINED_SHARE == 0.3  # assumed: two thirds of PaLM's 0.46
    assert phone.block_forward_s_per_token == flops / (SUSTAINED_SHARE * 2.8e12)
    assert phone.head_s_per_token == 4 * 10 * 100 / (SUSTAINED_SHARE * 2.8e12)


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(ScheduleError, match=r"no device 'labtop'.*did you mean 'laptop'"):
        device_preset("labtop", SIZES)
    with pytest.raises(ScheduleError, match=r"no link 'fiber'.*did you mean 'fibre'"):
        link_preset("fiber")
