"""The participants' factors of one layer, read one at a time.

    (weight, AdapterState) of every participant --LayerMembers--> (weight, Factors) of one layer, on a device

A rule goes through a layer's members as often as it likes. Nothing is copied before it is read, so however
many members there are, a device holds the factors of one, or of the few that are multiplied together. The
state of a participant may itself be read from a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch

from splitft.adapters.state import AdapterState, Factors, Key

Weighted = Sequence[tuple[float, Factors]]
"""Members of one layer: pairs of weight and factors."""


class _Members(Sequence[tuple[float, Factors]]):
    """Members by their position; slices are lists."""

    def _read(self, index: int) -> tuple[float, Factors]:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> tuple[float, Factors]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[float, Factors]]: ...

    def __getitem__(self, index: int | slice) -> tuple[float, Factors] | list[tuple[float, Factors]]:
        positions = range(len(self))[index]  # raises IndexError beyond the last, which ends an iteration
        if isinstance(positions, range):
            return [self._read(position) for position in positions]
        return self._read(positions)


class LayerMembers(_Members):
    """The members of one layer, each moved to a device when it is read."""

    def __init__(self, members: Sequence[tuple[float, AdapterState]], key: Key, device: torch.device) -> None:
        self._members, self._key, self._device = members, key, device

    def __len__(self) -> int:
        return len(self._members)

    def _read(self, index: int) -> tuple[float, Factors]:
        weight, state = self._members[index]
        return weight, state[self._key].to(self._device)


class MembersWithout(_Members):
    """Members, followed by factors whose product is subtracted from theirs."""

    def __init__(self, members: Weighted, parts: Sequence[Factors]) -> None:
        self._members, self._parts = members, parts

    def __len__(self) -> int:
        return len(self._members) + len(self._parts)

    def _read(self, index: int) -> tuple[float, Factors]:
        own = len(self._members)
        return self._members[index] if index < own else (-1.0, self._parts[index - own])
