"""Host copies of weights that were lately held on an accelerator, for cuts that move back.

    segment gives up block 4   cuda:0 --copy--> host, within a budget; the longest unused goes first
    segment takes block 4      host   --copy--> cuda:0, without the model's files

A controller that chooses cuts anew each round moves the same few blocks to and fro. To read them again takes
a disk, or the network, and with a quantized base the quantization again. On the CPU nothing is kept: there a
cut that moves up shall give memory free, and the operating system keeps files that were read.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Hashable

import torch

from splitft.model.devices import CPU

MOST_BYTES = 4 * 10**9
"""Host memory that these copies may take, or a tenth of the machine's if that is less."""


class LatelyHeld:
    """Weights that were given up, by what they are, the longest unused first."""

    def __init__(self, budget_bytes: float) -> None:
        """Keep copies of at most `budget_bytes` together."""
        self.budget_bytes = budget_bytes
        self._copies: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self._bytes = 0

    def keep(self, name: Hashable, weight: torch.Tensor) -> None:
        """Copy a weight that is given up to the host; weights of the CPU are not kept."""
        if weight.device.type in ("cpu", "meta") or weight.nbytes > self.budget_bytes:
            return
        if name in self._copies:  # frozen, so the copy is still right
            self._copies.move_to_end(name)
            return
        self._copies[name] = copy = weight.detach().to(CPU)
        self._bytes += copy.nbytes
        while self._bytes > self.budget_bytes:
            _, oldest = self._copies.popitem(last=False)
            self._bytes -= oldest.nbytes

    def find(self, name: Hashable) -> torch.Tensor | None:
        """Return the host copy of a weight, if there is one."""
        if name in self._copies:
            self._copies.move_to_end(name)
        return self._copies.get(name)


def host_budget_bytes() -> float:
    """Return the memory that host copies may take on this machine."""
    try:
        installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0.0
    return min(MOST_BYTES, 0.1 * installed)
