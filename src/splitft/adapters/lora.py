"""Many clients' LoRA factors on one frozen linear layer.

    x (B, T, in) --- frozen W ------------------------> y (B, T, out)
       rows of client a --- A_a, B_a --- scale --- + ---^
       rows of client b --- A_b, B_b --- scale --- + ---^

The base product is computed once for all rows; the rows of each client then get its own small product, so
every client has the result that it would have alone. A `slot` is one named set of factors: a client's, or one
shared by all. Besides the factors that it trains, a slot may hold frozen rows (the *rest* of factors of a
higher rank than its own) and the update that aggregation has *folded* into the base.

The factors are kept in float32 (float64 over a float64 base), and the small products are computed in the type
of the base, as in mixed precision training.

Shapes: B sequences, T tokens, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from splitft.adapters.dora import rescaled
from splitft.adapters.state import AdapterState, Factors, Key
from splitft.adapters.targets import chosen_layers, layer_sizes
from splitft.errors import AdapterError

Rows = Sequence[tuple[str | None, int]]
"""Owners of the rows of a batch, in order: (slot, sequences); slot None runs the base model."""


class _Routing:
    """The slots of the current batch's rows; shared by all layers of a segment."""

    def __init__(self) -> None:
        self.rows: Rows = ()


@dataclass(frozen=True)
class _SlotFactors:
    """The factors of one slot on one layer."""

    A: nn.Parameter
    """(R, in)."""
    B: nn.Parameter
    """(out, R)."""
    rest: Factors | None = None
    """Frozen rows of A and columns of B beside those that are trained."""
    folded: Factors | None = None
    """Update that was folded into the base, at a rank of its own."""
    gain: float = 1.0
    """Scale of A and B over that of `rest` and `folded` (rsLoRA)."""
    magnitude: nn.Parameter | None = None
    """(1, out): change of the magnitudes of the weight's rows (DoRA)."""

    def trained(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B in the scale of the other factors."""
        return self.A, self.B if self.gain == 1 else self.B * self.gain

    def all_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same, followed by the frozen rows."""
        A, B = self.trained()
        if self.rest is None:
            return A, B
        return torch.cat([A, self.rest.A]), torch.cat([B, self.rest.B], 1)


class LoraLayer(nn.Module):
    """A frozen linear layer with factors by slot."""

    def __init__(self, base: nn.Module, scale: float, routing: _Routing) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self.slots: dict[str, _SlotFactors] = {}
        self._routing = routing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, in) -> (B, T, out)."""
        y: torch.Tensor = self.base(x)
        rows = self._routing.rows
        counts = self._counts(x)
        # one owner
        if len(rows) == 1:
            slot = rows[0][0]
            return y if slot is None else self._adapted(x, y, self.slots[slot])
        # several owners of equal shapes: one batched product
        slots = [self.slots[slot] for slot, _ in rows if slot is not None]
        if len(slots) == len(rows) and len(set(counts)) == 1 and _can_be_batched(slots):
            y = y + self._batched_product(x, slots).view_as(y)
            return self._with_folded(x, y, slots[0])
        # any other batch: one product for each owner
        parts = zip(rows, torch.split(x, counts), torch.split(y, counts), strict=True)
        return torch.cat(
            [y_ if slot is None else self._adapted(x_, y_, self.slots[slot]) for (slot, _), x_, y_ in parts]
        )

    def update_norm(self, slot: str) -> float:
        """Return an upper bound of the Frobenius norm of a slot's update of the weight."""
        one = self.slots[slot]
        norm = _product_norm(*one.all_rows())
        if one.folded is not None:
            norm += _product_norm(one.folded.A, one.folded.B)
        change = 0.0 if one.magnitude is None else float(one.magnitude.detach().double().norm())
        return self.scale * norm + change

    def _batched_product(self, x: torch.Tensor, slots: Sequence[_SlotFactors]) -> torch.Tensor:
        """Return the small products of clients with equally many rows and equal ranks."""
        factors = [one.all_rows() for one in slots]
        A = torch.stack([A for A, _ in factors]).to(x.dtype)  # (clients, R, in)
        B = (torch.stack([B for _, B in factors]) * self.scale).to(x.dtype)  # (clients, out, R)
        small = torch.bmm(x.reshape(len(factors), -1, x.shape[-1]), A.mT)
        return torch.bmm(small, B.mT)

    def _adapted(self, x: torch.Tensor, y: torch.Tensor, slot: _SlotFactors) -> torch.Tensor:
        A, B = slot.all_rows()
        update = self._product(x, A, B)
        if slot.magnitude is not None:
            return rescaled(self.base, y, update, A, B * self.scale, slot.magnitude)
        return self._with_folded(x, y + update, slot)

    def _with_folded(self, x: torch.Tensor, y: torch.Tensor, slot: _SlotFactors) -> torch.Tensor:
        return y if slot.folded is None else y + self._product(x, slot.folded.A, slot.folded.B)

    def _product(self, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        small = functional.linear(x, A.to(x.dtype))
        return functional.linear(small, (B * self.scale).to(x.dtype))

    def _counts(self, x: torch.Tensor) -> list[int]:
        """Return the rows of x by owner: its sequences, or its tokens in families that flatten (B, T)."""
        counts = [count for _, count in self._routing.rows]
        sequences = sum(counts)
        if x.dim() == 2 and sequences and x.shape[0] % sequences == 0:
            return [count * (x.shape[0] // sequences) for count in counts]
        if sequences != x.shape[0]:
            raise AdapterError(f"a batch of {x.shape[0]} sequences is routed as {sequences}")
        return counts


def _product_norm(A: torch.Tensor, B: torch.Tensor) -> float:
    """Return the Frobenius norm of B A, without forming it: ||B A||^2 = sum of (B^T B) * (A A^T)."""
    A, B = A.detach().double(), B.detach().double()
    return math.sqrt(max(float(((B.mT @ B) * (A @ A.mT)).sum()), 0.0))


def _can_be_batched(slots: Sequence[_SlotFactors]) -> bool:
    """Return whether the products can be one: equal ranks, the same folded update, no magnitudes."""
    ranks = {one.A.shape[0] + (one.rest.rank if one.rest else 0) for one in slots}
    plain = all(one.magnitude is None and one.folded is slots[0].folded for one in slots)
    return plain and len(ranks) == 1


class AdapterBank:
    """All adapted layers of a model's blocks, and the slots of factors on them."""

    def __init__(
        self,
        layers: Mapping[Key, LoraLayer],
        routing: _Routing,
        dtype: torch.dtype,
        gain: Callable[[int], float] = lambda rank: 1.0,
    ) -> None:
        self._layers, self._routing, self._dtype, self._gain = dict(layers), routing, dtype, gain
        self._weight_norms: dict[Key, float] = {}

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
        """Set a slot's factors, replacing earlier ones. Raises AdapterError for layers that do not fit.

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
            A, B = (f.detach().to(self._dtype, copy=True) for f in (factors.A, factors.B))
            gain = self._gain(factors.rank) if factors.rank else 1.0
            B = B if gain == 1 else B / gain
            change = factors.magnitude
            magnitude = None if change is None else nn.Parameter(change.detach().to(self._dtype, copy=True))
            layer.slots[slot] = _SlotFactors(
                nn.Parameter(A, requires_grad="A" in trains),
                nn.Parameter(B, requires_grad="B" in trains),
                rows,
                update,
                gain,
                magnitude,
            )

    def take(self, slot: str, with_rest: bool = False) -> AdapterState:
        """Return a copy of a slot's factors, `with_rest` followed by its frozen rows."""
        factors = {}
        for key, layer in self._layers.items():
            if (one := layer.slots.get(slot)) is not None:
                A, B = one.all_rows() if with_rest else one.trained()
                magnitude = None if one.magnitude is None else one.magnitude.detach().clone()
                factors[key] = Factors(A.detach().clone(), B.detach().clone(), magnitude)
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

    def _weight_norm(self, key: Key, layer: LoraLayer) -> float:
        """Return the norm of a frozen weight, which is measured once."""
        if key not in self._weight_norms:
            weight: torch.Tensor = layer.base.weight  # type: ignore[assignment]
            wide = torch.promote_types(weight.dtype, torch.float32)
            norm = float(torch.linalg.vector_norm(weight.detach(), dtype=wide))
            self._weight_norms[key] = max(norm, 1e-3 * math.sqrt(weight.numel()))  # a weight may be zero
        return self._weight_norms[key]

    def drop(self, slot: str) -> None:
        """Remove a slot."""
        for layer in self._layers.values():
            layer.slots.pop(slot, None)

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
    def routed(self, rows: Rows) -> Iterator[None]:
        """Run batches whose rows belong to these slots, in this order."""
        before, self._routing.rows = self._routing.rows, tuple(rows)
        try:
            yield
        finally:
            self._routing.rows = before


def attach(
    blocks: Sequence[nn.Module],
    targets: str | Sequence[str],
    scale: float,
    dtype: torch.dtype,
    gain: Callable[[int], float] = lambda rank: 1.0,
) -> AdapterBank:
    """Replace the chosen linear layers of all blocks (which may be on meta) by LoRA layers.

    `targets` are those of `chosen_layers`, which raises AdapterError. The factors are kept in float32, or in
    `dtype` if that is wider. A slot trains at `scale * gain(rank)`; factors taken from it are in units of
    `scale` again.
    """
    routing = _Routing()
    layers: dict[Key, LoraLayer] = {}
    for index, block in enumerate(blocks):
        for path in chosen_layers(block, targets):
            parent_path, _, name = path.rpartition(".")
            layer = LoraLayer(block.get_submodule(path), scale, routing)
            setattr(block.get_submodule(parent_path), name, layer)
            layers[index, path] = layer
    return AdapterBank(layers, routing, torch.promote_types(dtype, torch.float32), gain)


def _check_fit(key: Key, layer: nn.Module, factors: Factors) -> None:
    width_in, width_out = layer_sizes(layer)
    if factors.A.shape[1] != width_in or factors.B.shape[0] != width_out:
        raise AdapterError(
            f"block {key[0]} {key[1]}: factors {tuple(factors.B.shape)} x {tuple(factors.A.shape)} "
            f"on a layer of {width_in} inputs and {width_out} outputs"
        )
