"""Peak memory of tensors, counted exactly: the bytes of all storages that operators have made and that live.

    with LiveMemory() as memory:        memory.peak, memory.live
        loss.backward()                 memory.synchronisations: numbers read one by one

What an operator allocates and frees within itself is not seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """A mode that follows the storages made while it is on; memory that was there before is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self.synchronisations = 0, 0
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}  # by address; 0 bytes for those from before

    @property
    def live(self) -> int:
        """Bytes that are in memory now."""
        self._forget_freed()
        return sum(nbytes for _, nbytes in self._known.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.synchronisations += function is torch.ops.aten._local_scalar_dense.default
        self._forget_freed()  # their addresses may be used again
        for storage in _storages((args, kwargs)):
            self._known.setdefault(storage._cdata, (StorageWeakRef(storage), 0))
        out = function(*args, **(kwargs or {}))
        for storage in _storages(out):
            self._known.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, self.live)
        return out

    def _forget_freed(self) -> None:
        self._known = {place: one for place, one in self._known.items() if not one[0].expired()}


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [one.untyped_storage() for one in tree_leaves(values) if isinstance(one, torch.Tensor)]
