"""Classes of machines and links by name, from published numbers: orders of magnitude, not measurements.

    "laptop" + ModelSizes --device_preset--> Device: operations of a block / (SUSTAINED_SHARE x peak)

Training does not reach the published peaks. The same share of the peak is assumed for all machines, so ratios
between presets do not depend on it.

A GPU computes what its host has launched. The host needs some microseconds for each kernel, however few
tokens it works on: BLOCK_LAUNCHES kernels a pass over a block, `DevicePreset.launch_us` each. This is an
estimate, and it is added to the time of the operations although a host launches while the GPU computes; so it
is off by default, and `schedule.launch_overhead` is its multiple on the clock (1 for the estimate as it is).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeVar

from splitft.errors import ScheduleError
from splitft.schedule.profile import GB, MBIT_PER_S, Device, Link
from splitft.schedule.sizes import ModelSizes

T = TypeVar("T")

SUSTAINED_SHARE = 0.3
"""Share of the peak that fine-tuning is assumed to reach (PaLM reports 0.46 for pre-training on its
own hardware, arXiv 2204.02311, table 3; small batches reach less)."""

BLOCK_LAUNCHES = 81
"""Kernels that one pass over a block launches: the mean of 66 in the forward and 96 in the backward pass, as
counted in bfloat16 on a llama block with LoRA on its attention (`tests/schedule/test_presets.py`)."""


@dataclass(frozen=True)
class DevicePreset:
    """A class of machines."""

    peak_flops_per_s: float
    """Dense peak in the fastest 16-bit or 32-bit format that training uses on it."""
    memory_bytes: float
    """Memory that training may use."""
    source: str
    """Publication of the peak and the memory, and the part left to other programs."""
    launch_us: float
    """Microseconds that its host needs to launch a kernel."""
    launch_source: str
    """Publication of that, or what it is assumed from."""


_CUDA = (
    "7 us of Python and C++ for torch's simplest operator with gradients (pytorch issue 41383), and some 3 "
    "of the driver"
)

# (name, peak in TFLOP/s, memory for training in GB, source, microseconds of a launch, their source)
_MACHINES = (
    ("phone", 2.8, 4,
     "Adreno 750 (Snapdragon 8 Gen 3): 1,536 FP32 units at 0.9 GHz, 2.8 TFLOP/s FP32, as third-party GPU "
     "tables list it (Qualcomm publishes none); 4 of 12 GB, the rest is the phone's",
     30, "24 to 36 us a dispatch of WebGPU over Vulkan (arXiv 2604.02344), measured on larger machines"),
    ("laptop", 3.6, 8,
     "Apple M2, 10-core GPU: 3.6 TFLOP/s FP32, as Apple states; 8 of 16 GB unified memory",
     20, "20 us a dispatch of torch's MPS operators on an M1 Pro (pytorch issue 148219)"),
    ("edge-gpu", 42, 24,
     "NVIDIA Jetson AGX Orin technical brief: 170 sparse INT8 TOPS on tensor cores, so 85 dense and 42 "
     "TFLOP/s FP16; 24 of 32 GB shared memory",
     20, f"assumed twice a workstation's, since its host is slower; there {_CUDA}"),
    ("workstation", 71, 22,
     "NVIDIA GeForce RTX 3090, GA102 whitepaper: 71 TFLOP/s dense BF16 with FP32 sums; 22 of 24 GB",
     10, _CUDA),
    ("server-gpu", 312, 78,
     "NVIDIA A100 80 GB data sheet: 312 TFLOP/s dense BF16; 78 of 80 GB",
     10, _CUDA),
)  # fmt: skip

# (name, up and down in Mbit/s, one-way delay in s, source)
_CONNECTIONS = (
    ("lte", 8, 30, 0.025,
     "4G in everyday use, 30 Mbit/s down, 8 up, 50 ms there and back: of the order of Ookla's and "
     "Opensignal's country medians, which differ by several times"),
    ("dsl", 10, 50, 0.01, "the usual VDSL2 product, 50 Mbit/s down and 10 up"),
    ("fibre", 100, 300, 0.005,
     "a usual fibre product, 300 Mbit/s down and 100 up; about 10 ms there and back"),
    ("lan", 1000, 1000, 0.00025, "Gigabit Ethernet, IEEE 802.3ab"),
)  # fmt: skip

DEVICES = {
    name: DevicePreset(peak * 1e12, memory * GB, source, launch_us, launch_source)
    for name, peak, memory, source, launch_us, launch_source in _MACHINES
}
"""Every class of machine, by the name a user writes."""

LINKS = {
    name: Link(name, up * MBIT_PER_S, down * MBIT_PER_S, latency_s, source)
    for name, up, down, latency_s, source in _CONNECTIONS
}
"""Every class of link, by the name a user writes."""


def device_preset(
    name: str, sizes: ModelSizes, context_tokens: int = 256, launch_overhead: float = 0.0
) -> Device:
    """Return a device of this class, with seconds derived from the model's operations.

    `launch_overhead` is the multiple of the estimated seconds for launching kernels, 0 to leave them out.
    Raises ScheduleError with the nearest name if there is no such class.
    """
    preset = _find(name, DEVICES, "device")
    flops_per_s = SUSTAINED_SHARE * preset.peak_flops_per_s
    block_s = sizes.block_flops_per_token(context_tokens) / flops_per_s
    head_s = sizes.head_flops_per_token() / flops_per_s
    source = f"{SUSTAINED_SHARE:g} of the peak of: {preset.source}"
    overhead_s = launch_overhead * BLOCK_LAUNCHES * preset.launch_us * 1e-6
    if overhead_s:
        source += f"; {launch_overhead:g} x {BLOCK_LAUNCHES} launches of {preset.launch_us:g} us a block"
    return Device(name, block_s, block_s, head_s, preset.memory_bytes, source, overhead_s)


def link_preset(name: str) -> Link:
    """Return the link of this class. Raises ScheduleError with the nearest name if there is none."""
    return _find(name, LINKS, "link")


def _find(name: str, presets: Mapping[str, T], kind: str) -> T:
    if name not in presets:
        near = get_close_matches(name, presets, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ScheduleError(f"there is no {kind} {name!r}, only {', '.join(presets)}{hint}")
    return presets[name]
