"""Hold each frozen tensor once in a process, however many segments use it.

    segment of client 1 ──┐
    segment of client 2 ──┼──> Parameter <..weak.. WeightStore[origin, shape, form]
    segment of the server ┘

N simulated clients hold the same embedding, head and blocks. Frozen weights are never written, so they can
share them: the store hands out one parameter to all that ask for the same tensor of the same file, in the
same form (type and device, or a quantized form). The store's own references are weak: when the last segment
frees a tensor, its memory is free. Of weights on accelerators, those lately given up stay on the host for a
while (`lately_held`). Nobody may change a parameter that the store has handed out, nor move its
module with `.to`; a tensor that was written in place all the same is found when somebody takes it again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from splitft.errors import ModelError
from splitft.model.devices import CPU
from splitft.model.weights.lately_held import LatelyHeld, host_budget_bytes

Reader = Callable[[list[str]], dict[str, torch.Tensor]]
"""Reads tensors by name, as they are in the checkpoint."""


class WeightForm(Protocol):
    """Form in which a tensor is held; hashable, and equal forms hold a tensor in the same way."""

    def hold(self, tensor: torch.Tensor) -> nn.Parameter:
        """Return a tensor of the checkpoint, or a copy of one held in this form, in this form, frozen."""

    def on(self, device: torch.device) -> WeightForm:
        """Return the same form on another device."""

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class PlainWeight:
    """A tensor of a data type on a device."""

    dtype: torch.dtype
    device: torch.device

    def hold(self, tensor: torch.Tensor) -> nn.Parameter:
        """Return the tensor in this type on this device; without a copy if it is there already."""
        return nn.Parameter(tensor.to(self.device, self.dtype), requires_grad=False)

    def on(self, device: torch.device) -> PlainWeight:
        """Return this type on another device."""
        return replace(self, device=device)


@dataclass(frozen=True)
class WantedWeight:
    """A tensor that a segment needs, and the form in which it needs it."""

    origin: Hashable
    """Place of the tensor, from `Checkpoint.origin`; a file that was changed is another place."""
    shape: torch.Size
    form: WeightForm


class WeightStore:
    """The frozen parameters of a process, by origin, shape and form."""

    def __init__(self, lately_held: LatelyHeld | None = None) -> None:
        """Begin empty; `lately_held` has the host copies, none by default."""
        self.lately_held = lately_held or LatelyHeld(0)
        self._held: dict[WantedWeight, _Held] = {}
        self._lock = threading.RLock()

    def take(self, wanted: Mapping[str, WantedWeight], read: Reader) -> dict[str, nn.Parameter]:
        """Return parameters by name: those that somebody holds, and the others through `read`.

        The caller keeps them alive. Threads that need the same tensor at once wait for one of them to read
        it. Raises ModelError if a parameter has been written in place since it was read.
        """
        with self._lock, torch.inference_mode(False):  # inference tensors could not be used in training
            found = {name: self._find(name, one) for name, one in wanted.items()}
            missing = [name for name, parameter in found.items() if parameter is None]
            copies = {name: self.lately_held.find(_on_any_device(wanted[name])) for name in missing}
            tensors = {name: copy for name, copy in copies.items() if copy is not None}
            if unread := [name for name in missing if name not in tensors]:
                tensors |= read(unread)
            taken = {name: parameter for name, parameter in found.items() if parameter is not None}
            for name in missing:
                taken[name] = parameter = wanted[name].form.hold(tensors.pop(name))
                self._held[wanted[name]] = _Held(parameter, self._forget, wanted[name])
        return taken

    def give_up(self, held: Mapping[WantedWeight, nn.Parameter]) -> None:
        """Note that a segment gives these parameters up; copies of them may stay on the host."""
        with self._lock:
            for wanted, parameter in held.items():
                self.lately_held.keep(_on_any_device(wanted), parameter)

    def __len__(self) -> int:
        """Return the number of parameters that somebody holds."""
        return len(self._held)

    def _find(self, name: str, wanted: WantedWeight) -> nn.Parameter | None:
        held = self._held.get(wanted)
        parameter = None if held is None else held()
        if held is not None and parameter is not None and parameter._version != held.version:
            raise ModelError(
                f"{name} was written in place while others hold it, so that it is not the model's any more: "
                "begin anew in a fresh process, and let code of your own copy a frozen weight before it "
                "changes one"
            )
        return parameter

    def _forget(self, held: weakref.ref[nn.Parameter]) -> None:
        """Drop the entry of a parameter that is gone; called in any thread at any time, so without lock."""
        assert isinstance(held, _Held)
        if self._held.get(held.wanted) is held:
            self._held.pop(held.wanted, None)


class _Held(weakref.ref[nn.Parameter]):
    """Weak reference to a parameter, with how often it had been written when it was read."""

    __slots__ = ("version", "wanted")

    version: int
    wanted: WantedWeight

    def __new__(
        cls,
        parameter: nn.Parameter,
        forget: Callable[[weakref.ref[nn.Parameter]], None],
        wanted: WantedWeight,
    ) -> _Held:
        held = super().__new__(cls, parameter, forget)
        held.version, held.wanted = parameter._version, wanted
        return held

    def __init__(self, *_: object) -> None:
        """Keep what `__new__` has set."""


def _on_any_device(wanted: WantedWeight) -> WantedWeight:
    """Return the name of a weight's host copy, which is the same for all devices that it was on."""
    return replace(wanted, form=wanted.form.on(CPU))


WEIGHTS = WeightStore(LatelyHeld(host_budget_bytes()))
"""The store of this process."""
