"""Factors and moments of idle clients on the host, where an accelerator has no room for those of all.

    a client's batch arrives    host --work--> accelerator    its factors and moments, for its whole step
    its step is complete        stays, until others need room: the longest idle is parked on the host first

A budget bounds the factors, gradients and moments that are on the accelerator at one time; clients in the
middle of a step count, and are never parked. Moving changes no number. On the CPU nothing moves: the host is
the device.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from splitft.adapters import AdapterBank, LocalOptimizer
from splitft.model.devices import device_memory

SHARE = 0.3
"""Share of an accelerator's memory for factors, gradients and moments; the rest is for the model."""


@dataclass
class _Trained:
    """One slot of factors with its optimizer."""

    bank: AdapterBank
    slot: str
    optimizer: LocalOptimizer
    nbytes: int
    busy: bool = False
    parked: bool = False

    def park(self) -> None:
        self.bank.park(self.slot)
        self.optimizer.follow(self.bank.parameters(self.slot))
        self.parked = True

    def recall(self) -> None:
        self.bank.recall(self.slot)
        self.optimizer.follow(self.bank.parameters(self.slot))
        self.parked = False


class Parking:
    """The factors and moments that train on some devices, by client."""

    def __init__(self, budget_bytes: float = math.inf) -> None:
        """Keep at most `budget_bytes` on the devices, as long as fewer clients than that are in a step."""
        self.budget_bytes = budget_bytes
        self._clients: OrderedDict[str, _Trained] = OrderedDict()  # the longest idle first

    @property
    def parked(self) -> list[str]:
        """Clients whose factors and moments are on the host."""
        return [name for name, one in self._clients.items() if one.parked]

    def add(self, client: str, bank: AdapterBank, slot: str, optimizer: LocalOptimizer) -> None:
        """Enter factors on the device, with the optimizer that begins to train them."""
        if math.isinf(self.budget_bytes):
            return
        factors = sum(parameter.nbytes for parameter in bank.parameters(slot).values())
        nbytes = factors * (2 + optimizer.moments_per_number)
        self._clients.pop(client, None)
        self._clients[client] = _Trained(bank, slot, optimizer, nbytes)
        self._make_room([])

    def work(self, clients: Iterable[str]) -> None:
        """Bring these clients' factors and moments to their devices, until `rest`."""
        known = [client for client in clients if client in self._clients]
        for client in known:
            self._clients[client].busy = True
            self._clients.move_to_end(client)
        self._make_room(known)
        for client in known:
            if self._clients[client].parked:
                self._clients[client].recall()

    def rest(self, client: str) -> None:
        """Note that a client is not in a step."""
        if client in self._clients:
            self._clients[client].busy = False

    def remove(self, client: str) -> None:
        """Forget a client, whose factors are on their device again if there still are any."""
        one = self._clients.pop(client, None)
        if one is not None and one.parked:
            one.bank.recall(one.slot)

    def clear(self) -> None:
        """Forget all clients, whose factors are gone."""
        self._clients.clear()

    def _make_room(self, wanted: Sequence[str]) -> None:
        """Park idle clients, the longest idle first, until those on the device and the wanted fit."""
        there = [one for name, one in self._clients.items() if not one.parked or name in wanted]
        total = sum(one.nbytes for one in there)
        for one in there:
            if total <= self.budget_bytes:
                return
            if not one.busy and not one.parked:
                one.park()
                total -= one.nbytes


def parking_on(devices: Iterable[torch.device]) -> Parking:
    """Return the parking for these devices: without a bound if one of them is the host, or hides its size."""
    sizes = [device_memory(device) for device in devices]
    return Parking(sum(math.inf if size is None else SHARE * size for size in sizes))
