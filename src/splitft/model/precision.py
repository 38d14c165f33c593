"""Choose the type that a device computes fastest: `model.dtype: auto`.

    device            bfloat16 if it has                                else
      cpu             avx512_bf16, amx_bf16 or Arm's bf16, and gains    float32
      cuda, rocm      compute capability 8.0                            float16 from 7.0 on, below it float32
      mps             products in bfloat16                              float16
      xpu, others     `is_bf16_supported`                               float32

A processor without such instructions multiplies bfloat16 several times slower than float32. Instructions
alone do not decide: torch may be built or told not to use them (`ONEDNN_MAX_CPU_ISA`). So a processor that
has them, or does not say, multiplies small matrices in both types for 50 ms. The gain is kept in the user's
cache folder by processor, instructions and version of torch, so that the runs of a machine agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from splitft.cache import KeyedCache, cache_folder
from splitft.model.devices import CPU
from splitft.specs import ModelSpec

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
AUTO = "auto"
AUTO_TYPES = frozenset({torch.bfloat16, torch.float32})
"""Types of hidden states and gradients under AUTO: a segment in float16 takes and returns float32."""

SECONDS = 0.05
"""Time of a measurement."""
ROWS, WIDTH = 64, 576
"""Shape of the products: a short batch of the default model. Larger products favour bfloat16 more."""
MARGIN = 1.1
"""Gain in time below which a measurement does not overrule the instructions: other programs disturb it."""
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_DEFAULT_FPMATH_MODE")
"""Environment variables that restrict the instructions that torch uses."""


@dataclass(frozen=True)
class Precision:
    """A type, and the reason for it."""

    dtype: str
    """Name in DTYPES."""
    reason: str
    """Why, in words that can follow the name in brackets."""

    def __str__(self) -> str:
        return f"{self.dtype} ({self.reason})"


def resolve(spec: ModelSpec, devices: Sequence[torch.device] = (CPU,)) -> ModelSpec:
    """Return the specification with the fastest type of these devices instead of `auto`."""
    return spec.model_copy(update={"dtype": fastest(devices).dtype}) if spec.dtype == AUTO else spec


def describe(dtype: str, devices: Sequence[torch.device] = (CPU,)) -> str:
    """Return a type with its reason, or with what is faster on these devices."""
    best = fastest(devices)
    return str(best) if best.dtype == dtype else f"{dtype} (as given; {best.dtype} is faster: {best.reason})"


def fastest(devices: Sequence[torch.device]) -> Precision:
    """Return the one type of a process: float32 if its devices are fastest in different ones."""
    native = {device: native_precision(device) for device in devices}
    if len({one.dtype for one in native.values()}) == 1:
        return next(iter(native.values()))
    each = ", ".join(f"{device} {one.dtype}" for device, one in native.items())
    return Precision("float32", f"the devices are fastest in different types: {each}")


def native_precision(device: torch.device) -> Precision:
    """Return the type that a device computes fastest among those that training holds up in."""
    if device.type == "cpu":
        return _on_cpu()
    if device.type == "cuda":
        return _on_cuda(device)
    if device.type == "mps":
        holds, otherwise = _multiplies(device, torch.bfloat16), "float16"
    else:
        supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
        holds, otherwise = bool(supported and supported()), "float32"
    return Precision("bfloat16", f"{device}") if holds else Precision(otherwise, f"{device} lacks bfloat16")


def bfloat16_instructions() -> tuple[str, ...] | None:
    """Return the processor's instructions for products in bfloat16; None if it is not known to torch."""
    if found := _capabilities():
        return tuple(sorted(name for name, has in found.items() if "bf16" in name and has is True))
    with contextlib.suppress(OSError):
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split())
        return tuple(sorted(flags & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}))
    return None


def measured_gain() -> float:
    """Return the gain of bfloat16 over float32 in time on this processor: from the cache, or measured now."""
    cache: KeyedCache[float] = KeyedCache(
        cache_folder() / "precision", dump=lambda gain: json.dumps(gain).encode(), load=_positive
    )
    facts = _facts()
    if (gain := cache.find(facts)) is None:
        gain = _measure()
        with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
            cache.put(facts, gain)
    return gain


def _on_cpu() -> Precision:
    found = bfloat16_instructions()
    if found == ():
        return Precision("float32", "this processor has no bfloat16 instructions")
    gain = measured_gain()
    if gain > (MARGIN if found is None else 1 / MARGIN):
        named = " and ".join(found) if found else "measured"
        return Precision("bfloat16", f"{named}, {gain:.1f} times as fast as float32 on this processor")
    return Precision("float32", f"bfloat16 is {1 / gain:.1f} times slower on this processor")


def _on_cuda(device: torch.device) -> Precision:
    major, minor = torch.cuda.get_device_capability(device)
    about = f"{device}, compute capability {major}.{minor}"
    if (major, minor) >= (8, 0):
        return Precision("bfloat16", about)
    return Precision("float16" if (major, minor) >= (7, 0) else "float32", f"{about}: no bfloat16")


def _multiplies(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a device multiplies in this type, and correctly."""
    try:
        ones = torch.ones(16, 16, device=device).to(dtype)
        return bool(((ones @ ones).float() == 16).all())
    except (RuntimeError, TypeError):
        return False


def _measure() -> float:
    """Return the time of products in float32 over that in bfloat16: forward and backward, on one thread.

    The processor's time counts, not the clock's, and the least of several turns: others may be busy.
    """
    now = time.thread_time if time.get_clock_info("thread_time").resolution < 1e-5 else time.perf_counter
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(n, WIDTH, generator=generator) for n in (ROWS, WIDTH))
    operands = {dtype: (rows.to(dtype), weight.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    least = dict.fromkeys(operands, float("inf"))
    turns, until = 0, now() + SECONDS
    with torch.no_grad(), _one_thread():
        while turns < 3 or now() < until:
            for dtype, (x, w) in operands.items():
                began = now()
                functional.linear(x, w) @ w  # the second product is that of a backward pass
                if turns:  # the first turn prepares the kernels
                    least[dtype] = min(least[dtype], now() - began)
            turns += 1
    return least[torch.float32] / least[torch.bfloat16]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: threads that wait for each other on a busy machine would be what is timed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _facts() -> tuple[object, ...]:
    """Return everything that the measurement depends on."""
    return ROWS, WIDTH, torch.__version__, device_facts(CPU)


def device_facts(device: torch.device) -> tuple[object, ...]:
    """Return what tells a device from others: the key of measurements on it."""
    if device.type == "cpu":
        limits = tuple((name, os.environ[name]) for name in LIMITS if name in os.environ)
        name = _capabilities().get("cpu_name") or platform.processor()
        return ("cpu", platform.node(), platform.machine(), name, bfloat16_instructions(), limits)
    module = torch.get_device_module(device)
    name = module.get_device_name(device) if hasattr(module, "get_device_name") else device.type
    return (device.type, platform.node(), name)


def _capabilities() -> Mapping[str, Any]:
    """Return what torch knows of the processor; nothing in versions of torch that do not tell."""
    known: Callable[[], Mapping[str, Any]] | None = getattr(torch.cpu, "get_capabilities", None)
    return known() if known is not None else {}


def _positive(data: bytes) -> float:
    gain = float(json.loads(data))
    if not 0 < gain < float("inf"):
        raise ValueError("not a gain")
    return gain
