"""The devices of this machine, and those that a run takes.

    auto | cpu | cuda | cuda:1 | mps | xpu  --find_device--> torch.device with its index
    DevicesSpec --take_devices--> RunDevices(server=(cuda:0, cuda:1), clients=(cpu,))

Segments, adapter banks, optimizers and the loss compute on a device. Messages, adapter states, moments and
checkpoints are on the CPU, and random numbers are drawn there, so that a run means the same on every device.
Results are bit-identical on one device and one version of torch; other devices differ by rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from splitft.errors import ConfigError
from splitft.geometry import Span
from splitft.specs import DevicesSpec

CPU = torch.device("cpu")


@dataclass(frozen=True)
class RunDevices:
    """The devices that the parties of a run compute on."""

    server: tuple[torch.device, ...] = (CPU,)
    """Those of the server's blocks, in order."""
    clients: tuple[torch.device, ...] = (CPU,)
    """Those of the clients, dealt to them in turn."""
    server_replicas: int = 1
    """Processes that hold the server's blocks."""

    def of_client(self, index: int) -> torch.device:
        """Return the device of a client, counted from 0."""
        return self.clients[index % len(self.clients)]

    @property
    def every(self) -> tuple[torch.device, ...]:
        """Each device once."""
        return tuple(dict.fromkeys((*self.server, *self.clients)))

    def __str__(self) -> str:
        """Say which party computes where: `server on cuda:0 and cuda:1, clients on cpu`."""
        if len(self.every) == 1 and self.server_replicas == 1:
            return f"all on {self.every[0]}"
        return f"{self.of_server}, clients on {_listed(self.clients)}"

    @property
    def of_server(self) -> str:
        """Say where the server computes: `server on cuda:0`, `server in 2 processes on cpu`."""
        processes = f" in {self.server_replicas} processes" if self.server_replicas > 1 else ""
        return f"server{processes} on {_listed(self.server)}"


def available_devices() -> tuple[torch.device, ...]:
    """Return the accelerators of this machine that torch can use, and then the CPU."""
    found: list[torch.device] = []
    if torch.accelerator.is_available() and (accelerator := torch.accelerator.current_accelerator()):
        found = [torch.device(accelerator.type, index) for index in range(torch.accelerator.device_count())]
    return (*found, CPU)


def find_device(name: str, key: str) -> torch.device:
    """Return a device of this machine by its name; `auto` is the first accelerator, or the CPU.

    Raises ConfigError, which begins with `key`, if there is no such device here.
    """
    available = available_devices()
    if name == "auto":
        return available[0]
    kind, _, index = name.partition(":")
    for device in available:
        if device.type == kind and (not index or int(index) == (device.index or 0)):
            return device
    has = ", ".join(map(str, available))
    raise ConfigError(f"{key}: found {name!r}; torch {torch.__version__} finds {has} here; give one, or auto")


def take_devices(spec: DevicesSpec) -> RunDevices:
    """Return the devices of this machine that a run asks for. Raises ConfigError if there are no such."""
    return RunDevices(
        **{
            party: tuple(find_device(name, f"devices.{party}{place}") for place, name in _places(given))
            for party, given in (("server", spec.server), ("clients", spec.clients))
        },
        server_replicas=spec.server_replicas,
    )


def divide_blocks(span: Span, devices: Sequence[torch.device]) -> dict[int, torch.device]:
    """Return the device of each block: contiguous ranges of about equal length, in the devices' order."""
    return {block: devices[place * len(devices) // len(span)] for place, block in enumerate(span)}


def device_memory(device: torch.device) -> float | None:
    """Return the bytes of a device's own memory; None if it has none, or does not say."""
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    if device.type == "mps":  # the part of the machine's memory that Metal recommends to use
        return float(module.recommended_max_memory())
    properties = getattr(module, "get_device_properties", None)
    total = getattr(properties(device), "total_memory", None) if properties else None
    return None if total is None else float(total)


def synchronize(devices: Iterable[torch.device]) -> None:
    """Wait until these devices have done all that they were told, so that a clock can be read."""
    for device in devices:
        if device.type == "cpu":
            continue
        module = torch.get_device_module(device)
        if device.type == "mps":  # it has one device, and takes no argument
            module.synchronize()
        else:
            module.synchronize(device)


def _places(given: str | Sequence[str]) -> list[tuple[str, str]]:
    """Return each name with its place in the user's list, such as `[1]`; none if it is not a list."""
    if isinstance(given, str):
        return [("", given)]
    return [(f"[{index}]", name) for index, name in enumerate(given)]


def _listed(devices: Sequence[torch.device]) -> str:
    *most, last = map(str, dict.fromkeys(devices))
    return f"{', '.join(most)} and {last}" if most else last
