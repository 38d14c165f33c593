"""Section `devices`: where the parties of this process compute."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from splitft.specs.base import Spec

ComputeDevice = Annotated[
    str,
    Field(pattern=r"^[a-z][a-z0-9]*(:[0-9]+)?$", examples=["auto, cpu, cuda, cuda:1, mps or xpu"]),
]
"""`auto`, or a device as torch names it. Which of them exist is known on the machine that computes."""


class DevicesSpec(Spec):
    """The devices that compute; the simulated clock's machines are in `schedule`."""

    server: ComputeDevice | Annotated[tuple[ComputeDevice, ...], Field(min_length=1)] = "auto"
    """Device of the server's blocks: `auto` (the first accelerator, or the CPU), `cpu`, `cuda`, `cuda:1`,
    `mps`, `xpu`. A list divides the blocks among these devices in contiguous ranges."""
    server_replicas: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that hold the server's blocks, with the clients divided among them by predicted work. Each
    needs the memory of the blocks, takes its share of the devices of `server` and of this machine's threads,
    and all compute at once. For clients with factors of their own (split.server_adapters: per-client)."""
    clients: ComputeDevice | Annotated[tuple[ComputeDevice, ...], Field(min_length=1)] = "auto"
    """Device of the clients in a simulation, or a list that is dealt to them in turn. A deployed site says it
    in its own `site.yaml` (machine.runs_on)."""

    @classmethod
    def everywhere(cls, device: str | tuple[str, ...]) -> DevicesSpec:
        """Return the devices of a process with one party."""
        return cls(server=device, clients=device)
