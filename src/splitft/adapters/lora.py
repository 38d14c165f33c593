"""Many clients' LoRA factors on one frozen linear layer.

    x (B, T, in) --- frozen W ------------------------> y (B, T, out)
       rows of client a --- A_a, B_a --- scale --- + ---^
       rows of client b --- A_b, B_b --- scale --- + ---^

The base product is one for all rows; each client's rows then meet its own small product, so a client gets the
result it would get alone. A `slot` is one named set of factors: a client's, or one shared by all. Beside what
it trains, a slot may carry frozen rows (the *rest* of factors of a higher rank than its own) and what
aggregation has *folded* into the base.

The factors are kept in float32 (float64 over a float64 base) and the small products are computed in the
type of the base, as in mixed precision training. Layers are nn.Linear or GPT-2's Conv1D, whose
weight is stored transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from splitft.adapters.dora import rescaled
from splitft.adapters.state import AdapterState, Factors, Key
from splitft.errors import AdapterError

Rows = Sequence[tuple[str | None, int]]
"""Who owns the rows of a batch, in order: (slot, sequences); slot None runs the base model."""

ATTENTION_NAMES = ("attn", "attention", "self_attn", "self_attention")


class _Routing:
    """Which rows of the batch at hand belong to which slot; shared by all layers of a segment."""

    def __init__(self) -> None:
        self.rows: Rows = ()


@dataclass(frozen=True)
class _Held:
    """What one slot has on one layer."""

    A: nn.Parameter
    """(R, in)."""
    B: nn.Parameter
    """(out, R)."""
    rest: Factors | None = None
    """Further rows of A and columns of B that this slot carries and does not train."""
    folded: Factors | None = None
    """Beside the base, at its own rank."""
    gain: float = 1.0
    """Scale of what is trained over that of all other factors (rsLoRA)."""
    magnitude: nn.Parameter | None = None
    """(1, out): change of the rows' magnitudes (DoRA)."""

    def own(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B in the scale of all."""
        return self.A, self.B if self.gain == 1 else self.B * self.gain

    def all_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with the rows that are carried along."""
        A, B = self.own()
        if self.rest is None:
            return A, B
        return torch.cat([A, self.rest.A]), torch.cat([B, self.rest.B], 1)


class LoraLayer(nn.Module):
    """A frozen linear layer with factors by slot."""

    def __init__(self, base: nn.Module, scale: float, routing: _Routing) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self.slots: dict[str, _Held] = {}
        self._routing = routing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, in) -> (B, T, out)."""
        y: torch.Tensor = self.base(x)
        rows = self._routing.rows
        counts = self._counts(x)
        if len(rows) == 1:
            slot = rows[0][0]
            return y if slot is None else self._adapted(x, y, self.slots[slot])
        held = [self.slots[slot] for slot, _ in rows if slot is not None]
        if len(held) == len(rows) and len(set(counts)) == 1 and _alike(held):
            y = y + self._together(x, held).view_as(y)
            return y if held[0].folded is None else y + self._product(x, held[0].folded.A, held[0].folded.B)
        parts = zip(rows, torch.split(x, counts), torch.split(y, counts), strict=True)
        return torch.cat(
            [y_ if slot is None else self._adapted(x_, y_, self.slots[slot]) for (slot, _), x_, y_ in parts]
        )

    def _together(self, x: torch.Tensor, held: Sequence[_Held]) -> torch.Tensor:
        """The small products of clients with equally many rows and equal ranks, in one batched product."""
        factors = [one.all_rows() for one in held]
        A = torch.stack([A for A, _ in factors]).to(x.dtype)  # (clients, R, in)
        B = (torch.stack([B for _, B in factors]) * self.scale).to(x.dtype)  # (clients, out, R)
        small = torch.bmm(x.reshape(len(factors), -1, x.shape[-1]), A.mT)
        return torch.bmm(small, B.mT)

    def _adapted(self, x: torch.Tensor, y: torch.Tensor, held: _Held) -> torch.Tensor:
        A, B = held.all_rows()
        if held.magnitude is not None:
            update = self._product(x, A, B)
            return rescaled(self.base, y, update, A, B * self.scale, held.magnitude)
        y = y + self._product(x, A, B)
        return y if held.folded is None else y + self._product(x, held.folded.A, held.folded.B)

    def _product(self, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        small = functional.linear(x, A.to(x.dtype))
        return functional.linear(small, (B * self.scale).to(x.dtype))

    def _counts(self, x: torch.Tensor) -> list[int]:
        """Rows of x by client: its sequences, or its tokens in families that flatten (B, T)."""
        counts = [count for _, count in self._routing.rows]
        sequences = sum(counts)
        if x.dim() == 2 and sequences and x.shape[0] % sequences == 0:
            return [count * (x.shape[0] // sequences) for count in counts]
        if sequences != x.shape[0]:
            raise AdapterError(f"a batch of {x.shape[0]} sequences whose rows are said to be {sequences}")
        return counts


def _alike(held: Sequence[_Held]) -> bool:
    """Whether their products can be batched: equal ranks, the same part beside the base, no magnitudes."""
    ranks = {one.A.shape[0] + (one.rest.rank if one.rest else 0) for one in held}
    plain = all(one.magnitude is None and one.folded is held[0].folded for one in held)
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

    @property
    def sizes(self) -> dict[Key, tuple[int, int]]:
        """(in, out) of every adapted layer of every block, held or not."""
        return {key: _sizes(layer.base) for key, layer in self._layers.items()}

    def put(
        self,
        slot: str,
        state: AdapterState,
        rest: AdapterState | None = None,
        folded: AdapterState | None = None,
        trains: str = "AB",
    ) -> None:
        """Set a slot's factors, replacing what it had. Raises AdapterError for layers that do not fit.

        `rest` and `folded` take part in the forward pass and are not trained; `trains` names the factors of
        `state` that are.
        """
        self.drop(slot)
        for key, factors in state.items():
            layer = self._layers.get(key)
            if layer is None:
                raise AdapterError(f"block {key[0]} has no adapted layer {key[1]!r}")
            carried = None if rest is None else rest.get(key)
            beside = None if folded is None else folded.get(key)
            for one in (factors, carried, beside):
                if one is not None:
                    _check_fit(key, layer.base, one)
            A, B = (f.detach().to(self._dtype, copy=True) for f in (factors.A, factors.B))
            gain = self._gain(factors.rank) if factors.rank else 1.0
            B = B if gain == 1 else B / gain
            change = factors.magnitude
            magnitude = None if change is None else nn.Parameter(change.detach().to(self._dtype, copy=True))
            layer.slots[slot] = _Held(
                nn.Parameter(A, requires_grad="A" in trains),
                nn.Parameter(B, requires_grad="B" in trains),
                carried,
                beside,
                gain,
                magnitude,
            )

    def take(self, slot: str, whole: bool = False) -> AdapterState:
        """A copy of a slot's factors; `whole` with the rows that it carries and does not train."""
        held = {key: layer.slots[slot] for key, layer in self._layers.items() if slot in layer.slots}
        factors = {}
        for key, one in held.items():
            A, B = one.all_rows() if whole else one.own()
            magnitude = None if one.magnitude is None else one.magnitude.detach().clone()
            factors[key] = Factors(A.detach().clone(), B.detach().clone(), magnitude)
        return AdapterState(factors)

    def drop(self, slot: str) -> None:
        """Forget a slot."""
        for layer in self._layers.values():
            layer.slots.pop(slot, None)

    def parameters(self, slot: str) -> dict[tuple[int, str, str], nn.Parameter]:
        """A slot's trainable tensors by (block, target, "A", "B" or "M")."""
        held: dict[tuple[int, str, str], nn.Parameter] = {}
        for (block, target), layer in self._layers.items():
            if slot in layer.slots:
                one = layer.slots[slot]
                parts = {"A": one.A, "B": one.B, "M": one.magnitude}
                held.update({
                    (block, target, part): p for part, p in parts.items() if p is not None and p.requires_grad
                })  # fmt: skip
        return held

    @contextmanager
    def routed(self, rows: Rows) -> Iterator[None]:
        """Within, the batch's rows belong to these slots in this order."""
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
    """Put LoRA layers in place of the chosen linear layers of all blocks (which may be on meta).

    `targets`: "attention", "all-linear", or names; a name fits a layer whose path ends with it. The factors
    are kept in float32, or in `dtype` if that is wider; while a slot trains at a rank, its scale is
    `scale * gain(rank)`, and what is taken from it is in units of `scale` again. Raises AdapterError, listing
    the layers there are, if a name fits none.
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


def chosen_layers(block: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Paths of the linear layers of one block that `targets` names."""
    linear = [path for path, module in block.named_modules() if is_linear(module)]
    if targets == "all-linear":
        return linear
    if targets == "attention":
        chosen = [path for path in linear if set(path.split(".")[:-1]) & set(ATTENTION_NAMES)]
        if not chosen:
            raise AdapterError(f"no attention layers in this family; name targets among {', '.join(linear)}")
        return chosen
    names = [targets] if isinstance(targets, str) else list(targets)
    fitting = {name: [p for p in linear if p == name or p.endswith(f".{name}")] for name in names}
    unknown = [name for name, paths in fitting.items() if not paths]
    if unknown:
        raise AdapterError(f"no linear layer named {', '.join(unknown)}; there are {', '.join(linear)}")
    return [path for path in linear if any(path in paths for paths in fitting.values())]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer that can be adapted: nn.Linear or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _check_fit(key: Key, layer: nn.Module, factors: Factors) -> None:
    width_in, width_out = _sizes(layer)
    if factors.A.shape[1] != width_in or factors.B.shape[0] != width_out:
        raise AdapterError(
            f"block {key[0]} {key[1]}: factors {tuple(factors.B.shape)} x {tuple(factors.A.shape)} "
            f"on a layer of {width_in} inputs and {width_out} outputs"
        )


def _sizes(layer: Any) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    width_in, width_out = layer.weight.shape  # Conv1D
    return int(width_in), int(width_out)
