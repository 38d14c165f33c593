"""The adapted layers of a model's blocks, and the slots of factors on them.

    put(slot, state) --> factors on the layers, each on the device of its block --> take(slot) on the CPU
    routed([(slot, sequences), ...]) says whose rows a batch has while it runs

`lora.py` holds one layer; here is what a client or the server does with all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from splitft.adapters.dropout import DropoutRows
from splitft.adapters.lora import LoraLayer, Routing, Rows, SlotFactors
from splitft.adapters.state import CPU, AdapterState, Factors, Key
from splitft.adapters.targets import chosen_layers, layer_sizes, weight_of
from splitft.errors import AdapterError
from splitft.half_precision import current_pass, within


class AdapterBank:
    """All adapted layers of a model's blocks, and the slots of factors on them."""

    def __init__(
        self,
        layers: Mapping[Key, LoraLayer],
        routing: Routing,
        dtype: torch.dtype,
        gain: Callable[[int], float] = lambda rank: 1.0,
        device_of: Callable[[int], torch.device] = lambda block: CPU,
    ) -> None:
        self._layers, self._routing, self._dtype, self._gain = dict(layers), routing, dtype, gain
        self._device_of = device_of
        self._weight_norms: dict[Key, float] = {}
        self._folded: dict[Key, tuple[Factors, Factors]] = {}  # folded updates given, and on the device

    @property
    def sizes(self) -> dict[Key, tuple[int, int]]:
        """Sizes (in, out) of every adapted layer of every block, loaded or not."""
        return {key: layer_sizes(layer.base) for key, layer in self._layers.items()}

    def put(
        self,
        slot: str,
        state: AdapterState,
        rest: AdapterState | None = None,
        folded: AdapterState | None = None,
        trains: str = "AB",
    ) -> None:
        """Set a slot's factors, replacing earlier ones, on the devices of their blocks.

        Raises AdapterError for layers that do not fit.

        `rest` and `folded` take part in the forward pass and are not trained; `trains` names the factors of
        `state` that are.
        """
        self.drop(slot)
        for key, factors in state.items():
            layer = self._layers.get(key)
            if layer is None:
                raise AdapterError(f"block {key[0]} has no adapted layer {key[1]!r}")
            rows, update = (None if one is None else one.get(key) for one in (rest, folded))
            for one in (factors, rows, update):
                if one is not None:
                    _check_fit(key, layer.base, one)
            device = self._device_of(key[0])
            A, B = (f.detach().to(device, self._dtype, copy=True) for f in (factors.A, factors.B))
            gain = self._gain(factors.rank) if factors.rank else 1.0
            B = (B if gain == 1 else B / gain).mT.contiguous().mT  # as `SlotFactors` keeps it
            change = factors.magnitude
            if change is not None:
                change = nn.Parameter(change.detach().to(device, self._dtype, copy=True))
            layer.slots[slot] = SlotFactors(
                nn.Parameter(A, requires_grad="A" in trains),
                nn.Parameter(B, requires_grad="B" in trains),
                None if rows is None else rows.to(device),
                None if update is None else self._folded_on(key, update, device),
                gain,
                change,
            )

    def take(self, slot: str, with_rest: bool = False) -> AdapterState:
        """Return a copy of a slot's factors on the CPU, `with_rest` followed by its frozen rows."""
        factors = {}
        for key, layer in self._layers.items():
            if (one := layer.slots.get(slot)) is not None:
                A, B = one.all_rows() if with_rest else one.trained()
                parts = (A, B) if one.magnitude is None else (A, B, one.magnitude)
                factors[key] = Factors(*(part.detach().to(CPU, copy=True).contiguous() for part in parts))
        return AdapterState(factors)

    @torch.no_grad()
    def largest_update(self, slot: str) -> tuple[float, Key | None]:
        """Return the largest update of a layer relative to its weight (Frobenius norms), and the layer.

        The norms of the parts of an update (factors, folded update, magnitudes) are added. Not a number if a
        factor is not finite.
        """
        ratios = {
            key: layer.update_norm(slot) / self._weight_norm(key, layer)
            for key, layer in self._layers.items()
            if slot in layer.slots
        }
        if not ratios:
            return 0.0, None
        worst = max(ratios, key=lambda key: math.inf if math.isnan(ratios[key]) else ratios[key])
        return ratios[worst], worst

    def _folded_on(self, key: Key, update: Factors, device: torch.device) -> Factors:
        """Return a folded update on a device, the same one for every slot that is given this update."""
        given, moved = self._folded.get(key, (None, None))
        if given is not update or moved is None or moved.A.device != device:
            moved = update.to(device)
            self._folded[key] = update, moved
        return moved

    def _weight_norm(self, key: Key, layer: LoraLayer) -> float:
        """Return the norm of a frozen weight, which is measured once."""
        if key not in self._weight_norms:
            weight = weight_of(layer.base)
            wide = torch.promote_types(weight.dtype, torch.float32)
            norm = float(torch.linalg.vector_norm(weight.detach(), dtype=wide))
            self._weight_norms[key] = max(norm, 1e-3 * math.sqrt(weight.numel()))  # a weight may be zero
        return self._weight_norms[key]

    def copy(self, slot: str, to: str, blocks: Container[int]) -> None:
        """Set slot `to` to a copy of a slot's factors in these blocks; what is not trained is the same."""
        for (block, _), layer in self._layers.items():
            if block in blocks and (one := layer.slots.get(slot)) is not None:
                layer.slots[to] = one.copied()
                layer.forget_stack()

    def hand_over(self, slot: str, to: str) -> None:
        """Give a slot's gradients to the same parameters of slot `to`."""
        receivers = self.parameters(to)
        for key, parameter in self.parameters(slot).items():
            receivers[key].grad, parameter.grad = parameter.grad, None

    def drop(self, slot: str) -> None:
        """Remove a slot."""
        for layer in self._layers.values():
            layer.slots.pop(slot, None)
            layer.forget_stack()

    def park(self, slot: str) -> None:
        """Move a slot's factors to the host. They can be taken from there, but take part in no pass."""
        self._move(slot, lambda block: CPU)

    def recall(self, slot: str) -> None:
        """Move a slot's factors back to the devices of their blocks."""
        self._move(slot, self._device_of)

    def _move(self, slot: str, device_of: Callable[[int], torch.device]) -> None:
        for (block, _), layer in self._layers.items():
            if (one := layer.slots.get(slot)) is not None:
                layer.slots[slot] = one.to(device_of(block))
                layer.forget_stack()

    def parameters(self, slot: str) -> dict[tuple[int, str, str], nn.Parameter]:
        """Return a slot's trainable tensors by (block, target, "A", "B" or "M")."""
        found: dict[tuple[int, str, str], nn.Parameter] = {}
        for (block, target), layer in self._layers.items():
            if slot in layer.slots:
                one = layer.slots[slot]
                parts = {"A": one.A, "B": one.B, "M": one.magnitude}
                found.update({
                    (block, target, part): p for part, p in parts.items() if p is not None and p.requires_grad
                })  # fmt: skip
        return found

    @contextmanager
    def routed(self, rows: Rows, dropout: Sequence[DropoutRows] = ()) -> Iterator[None]:
        """Run batches whose rows belong to these slots, in this order; `dropout` has the same rows."""
        routing = self._routing
        before = routing.rows, routing.dropout
        routing.rows, routing.dropout = tuple(rows), tuple(dropout)
        try:
            yield
        finally:
            routing.rows, routing.dropout = before

    def recorded(self, block: int) -> Recorded:
        """Return a context in which the layers of a block run as now, to compute it again (checkpointing)."""
        layers = [layer for (index, _), layer in self._layers.items() if index == block]
        return Recorded(self, self._routing, layers)


class Recorded:
    """A context in which layers run as when it was made: for the same rows, with the factors of that time.

    A client may have left meanwhile, and its slot with it, while the others of its batch go on. Factors of a
    client that has completed its step have changed: its rows get no gradient any more, and change no others.
    """

    def __init__(self, bank: AdapterBank, routing: Routing, layers: Sequence[LoraLayer]) -> None:
        self._bank, self._pass = bank, current_pass()
        self._rows, self._dropout = routing.rows, routing.dropout
        slots = [slot for slot, _ in routing.rows if slot is not None]
        self._then = [(layer, {slot: layer.slots[slot] for slot in slots}) for layer in layers]
        self._entered: list[ExitStack] = []

    def __enter__(self) -> None:
        stack = ExitStack()
        stack.enter_context(self._bank.routed(self._rows, self._dropout))
        stack.enter_context(within(self._pass))
        for layer, then in self._then:
            stack.callback(setattr, layer, "slots", layer.slots)
            layer.slots = then
        self._entered.append(stack)

    def __exit__(self, *raised: object) -> None:
        self._entered.pop().close()


def attach(
    blocks: Sequence[nn.Module],
    targets: str | Sequence[str],
    scale: float,
    dtype: torch.dtype,
    gain: Callable[[int], float] = lambda rank: 1.0,
    device_of: Callable[[int], torch.device] = lambda block: CPU,
) -> AdapterBank:
    """Replace the chosen linear layers of all blocks (which may be on meta) by LoRA layers.

    `targets` are those of `chosen_layers`, which raises AdapterError. The factors are kept in float32, or in
    `dtype` if that is wider, on the device of their block. A slot trains at `scale * gain(rank)`; factors
    taken from it are in units of `scale` again.
    """
    routing = Routing()
    layers: dict[Key, LoraLayer] = {}
    for index, block in enumerate(blocks):
        for path in chosen_layers(block, targets):
            parent_path, _, name = path.rpartition(".")
            layer = LoraLayer(block.get_submodule(path), (index, path), scale, routing)
            setattr(block.get_submodule(parent_path), name, layer)
            layers[index, path] = layer
    return AdapterBank(layers, routing, torch.promote_types(dtype, torch.float32), gain, device_of)


def _check_fit(key: Key, layer: nn.Module, factors: Factors) -> None:
    width_in, width_out = layer_sizes(layer)
    if factors.A.shape[1] != width_in or factors.B.shape[0] != width_out:
        raise AdapterError(
            f"block {key[0]} {key[1]}: factors {tuple(factors.B.shape)} x {tuple(factors.A.shape)} "
            f"on a layer of {width_in} inputs and {width_out} outputs"
        )
