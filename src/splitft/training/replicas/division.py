"""Which replica computes on which devices, and for which clients.

    devices  cuda:0 cuda:1 cuda:2 cuda:3   2 replicas   ->   [cuda:0 cuda:1], [cuda:2 cuda:3]
    clients  a 900, b 500, c 400           2 replicas   ->   [a], [b c]        the largest work first

The work of a client is predicted as the padded tokens of its batches times the blocks that its cut leaves to
the server. Each client goes to the replica that has the least work so far, the largest first (longest
processing time first: Graham 1969, at most 4/3 of the best makespan).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from splitft.model import CPU
from splitft.model.devices import RunDevices


@dataclass(frozen=True)
class ReplicaPlan:
    """The replicas of a server."""

    count: int
    """Processes."""
    devices: tuple[torch.device, ...] = (CPU,)
    """Devices of all of them, in order."""
    tokens: Mapping[str, float] = field(default_factory=dict)
    """Padded tokens of each client's batches, on average."""

    def devices_of(self, number: int) -> tuple[torch.device, ...]:
        """Return the devices of one replica, from 0: contiguous shares, or one that several use."""
        start, stop = (place * len(self.devices) // self.count for place in (number, number + 1))
        return self.devices[start : max(stop, start + 1)]

    def divide(self, blocks_by_client: Mapping[str, int]) -> dict[str, int]:
        """Return the replica of each client, given the blocks that the server holds for it."""
        work = {name: blocks * self.tokens.get(name, 1.0) for name, blocks in blocks_by_client.items()}
        loads, places = [0.0] * self.count, dict[str, int]()
        for name in sorted(work, key=lambda name: (-work[name], name)):
            place = loads.index(min(loads))
            loads[place] += work[name]
            places[name] = place
        return places


def plan_replicas(devices: RunDevices, tokens: Mapping[str, float]) -> ReplicaPlan | Sequence[torch.device]:
    """Return the plan for these clients' tokens; the server's devices alone if it is one process."""
    count = min(devices.server_replicas, len(tokens))
    return ReplicaPlan(count, devices.server, dict(tokens)) if count > 1 else devices.server
