"""Read frozen weights into modules on the meta device, and free them again.

    module on the meta device --fill--> parameters of the process's WeightStore --free--> meta device

A module knows the names and shapes of its tensors without any memory. Filled with them, it shares its
parameters with every other segment of the process that holds the same ones (`weights.store`). So nobody may
write a frozen parameter in place, nor move the module with `.to`: fill it for another device instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from splitft.errors import ModelError
from splitft.model.quantized_layers import quantized_form, read_bytes
from splitft.model.weights import WEIGHTS, Checkpoint, PlainWeight, WantedWeight, WeightForm

Place = tuple[nn.Module, str]
"""A module and the name of one of its tensors."""


class FrozenModule:
    """A module on the meta device whose tensors can be read from a checkpoint, and freed again."""

    def __init__(self, prefix: str, module: nn.Module) -> None:
        self.module = module
        self.places, self.buffers = dict[str, Place](), dict[str, Place]()
        for path, part in module.named_modules(prefix=prefix):
            self.places.update((f"{path}.{name}", (part, name)) for name in _present(part._parameters))
            kept = _present(part._buffers) - part._non_persistent_buffers_set
            self.buffers.update((f"{path}.{name}", (part, name)) for name in kept)
        self._empty = {name: getattr(*place) for name, place in self.places.items()}
        self._wanted = dict[str, WantedWeight]()  # what is held, by name; empty on the meta device

    def fill(self, checkpoint: Checkpoint, dtype: torch.dtype, owner: Any, device: torch.device) -> int:
        """Read the tensors to `device`, and compute the buffers that checkpoints lack.

        Returns the bytes of parameters.

        `owner` is the whole model, which knows how to compute buffers. Raises ModelError for missing tensors
        and for shapes that differ.
        """
        for part in self.module.modules():
            fill_buffers(part, owner, device)

        def read(names: list[str]) -> dict[str, torch.Tensor]:
            quantized = {name: form for name in names if (form := quantized_form(*self._place(name), device))}
            tensors = checkpoint.read(name for name in names if name not in quantized)
            tensors |= {name: read_bytes(checkpoint, name, form) for name, form in quantized.items()}
            for name, tensor in tensors.items():
                if name not in quantized or tensor.dim() > 1:  # bytes are checked when they are made
                    self._check_shape(name, tensor)
            return tensors

        origins = checkpoint.origins(self.places)
        wanted = {
            name: WantedWeight(origins[name], self._empty[name].shape, form_of(place, dtype, device))
            for name, place in self.places.items()
        }
        held = WEIGHTS.take(wanted, read)
        self._wanted = wanted
        for name, (part, attribute) in self.places.items():
            part._parameters[attribute] = held[name]
        saved = {name: place for name, place in self.buffers.items() if name in checkpoint}
        for name, tensor in read(list(saved)).items():  # few and small, and a family's code may write them
            part, attribute = saved[name]
            part._buffers[attribute] = tensor.to(device, getattr(part, attribute).dtype, copy=True)
        return sum(parameter.nbytes for parameter in held.values())

    def loaded(self) -> dict[int, int]:
        """Return the sizes of the parameters that are in memory, by identity; bytes count as the weights."""
        parameters = {name: part._parameters[attribute] for name, (part, attribute) in self.places.items()}
        return {
            id(p): self._empty[name].numel()
            for name, p in parameters.items()
            if p is not None and not p.is_meta
        }

    def free(self) -> None:
        """Put the parameters of the meta device back; memory that no other segment holds is free."""
        WEIGHTS.give_up({one: getattr(*self.places[name]) for name, one in self._wanted.items()})
        self._wanted = {}
        for name, (part, attribute) in self.places.items():
            part._parameters[attribute] = self._empty[name]

    def _place(self, name: str) -> Place:
        return self.places[name] if name in self.places else self.buffers[name]

    def _check_shape(self, name: str, tensor: torch.Tensor) -> None:
        expected = self._empty[name] if name in self._empty else getattr(*self.buffers[name])
        if tensor.shape != expected.shape:
            wanted, found = tuple(expected.shape), tuple(tensor.shape)
            raise ModelError(f"{name} has shape {found} in the checkpoint; the model needs {wanted}")


def form_of(place: Place, dtype: torch.dtype, device: torch.device) -> WeightForm:
    """Return the form in which a parameter is held."""
    return quantized_form(*place, device) or PlainWeight(dtype, device)


def _present(tensors: Mapping[str, torch.Tensor | None]) -> set[str]:
    return {name for name, tensor in tensors.items() if tensor is not None}


def fill_buffers(part: nn.Module, owner: Any, device: torch.device) -> None:
    """Compute a module's buffers that checkpoints do not contain (rotary angles, causal masks).

    They are computed on the CPU, so that they are the same on every device.
    """
    buffers = {name: buffer for name, buffer in part._buffers.items() if buffer is not None}
    if not any(buffer.is_meta for buffer in buffers.values()):
        return
    for name, buffer in buffers.items():
        part._buffers[name] = torch.empty_like(buffer, device="cpu")
    owner._init_weights(part)
    for name in buffers:
        part._buffers[name] = getattr(part, name).to(device)
