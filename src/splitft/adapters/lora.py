"""Many clients' LoRA factors on one frozen linear layer.

    x (B, T, in) --- frozen W ------------------------> y (B, T, out)
       rows of client a --- A_a, B_a --- scale --- + ---^
       rows of client b --- A_b, B_b --- scale --- + ---^

The base product is computed once for all rows; the rows of each client then get its own small product, all
clients' together where their factors allow it (`grouped.py`), so every client has the result that it would
have alone. A `slot` is one named set of factors: a client's, or one shared by all. Besides the factors that
it trains, a slot may hold frozen rows (the *rest* of factors of a higher rank than its own) and the update
that aggregation has *folded* into the base. In training, x may have dropout before A (`dropout.py`), but not
before what is folded, which is a part of W.

The factors are kept in float32 (float64 over a float64 base), and the small products are computed in the type
of the base, as in mixed precision training.

Shapes: B sequences, T tokens, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.nn import functional

from splitft.adapters.dora import direction_gain, rescaled
from splitft.adapters.dropout import DropoutRows, dropped
from splitft.adapters.grouped import FactorStack, Part, changes, product_kind, row_layout, update_together
from splitft.adapters.state import CPU, Factors, Key
from splitft.errors import AdapterError
from splitft.half_precision import HALF, Pass, current_pass

Rows = Sequence[tuple[str | None, int]]
"""Owners of the rows of a batch, in order: (slot, sequences); slot None runs the base model."""


class Routing:
    """The slots of the current batch's rows; shared by all layers of a segment."""

    def __init__(self) -> None:
        self.rows: Rows = ()
        self.dropout: Sequence[DropoutRows] = ()
        """The same rows by client, in a training step with dropout."""


@dataclass(frozen=True)
class SlotFactors:
    """The factors of one slot on one layer."""

    A: nn.Parameter
    """(R, in)."""
    B: nn.Parameter
    """(out, R), in memory like its transpose."""
    rest: Factors | None = None
    """Frozen rows of A and columns of B beside those that are trained."""
    folded: Factors | None = None
    """Update that was folded into the base, at a rank of its own."""
    gain: float = 1.0
    """Scale of A and B over that of `rest` and `folded` (rsLoRA)."""
    magnitude: nn.Parameter | None = None
    """(1, out): change of the magnitudes of the weight's rows (DoRA)."""
    transposed: tuple[torch.Tensor, ...] = field(init=False, repr=False)
    """Views (R, out) of B and of that of `rest`, made once, not in every step."""

    def __post_init__(self) -> None:
        frozen = () if self.rest is None else (self.rest.B,)
        object.__setattr__(self, "transposed", tuple(B.detach().mT for B in (self.B, *frozen)))

    def trained(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B in the scale of the other factors."""
        return self.A, self.B if self.gain == 1 else self.B * self.gain

    def all_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same, followed by the frozen rows."""
        A, B = self.trained()
        if self.rest is None:
            return A, B
        return torch.cat([A, self.rest.A]), torch.cat([B, self.rest.B], 1)

    def parts(self, scale: float) -> list[Part]:
        """Return the factors as a stack takes them: those that are trained, and the frozen rows."""
        parts = [Part(self.A, self.transposed[0], scale * self.gain, (self.A, self.B))]
        if self.rest is not None:
            parts.append(Part(self.rest.A, self.transposed[1], scale))
        return parts

    def to(self, device: torch.device) -> SlotFactors:
        """Return the factors on a device, as new parameters; what was folded stays where it is."""
        return replace(
            self,
            A=_moved(self.A, device),
            B=_moved(self.B, device),
            rest=None if self.rest is None else self.rest.to(device),
            magnitude=None if self.magnitude is None else _moved(self.magnitude, device),
        )

    def copied(self) -> SlotFactors:
        """Return the factors as new parameters with values of their own."""
        return replace(
            self,
            A=_copied(self.A),
            B=_copied(self.B),
            magnitude=None if self.magnitude is None else _copied(self.magnitude),
        )

    def changes(self) -> tuple[int, ...]:
        """Return numbers of which one rises when A or B is changed in place."""
        return (*changes(self.A), *changes(self.B))


@dataclass(frozen=True)
class _Inputs:
    """Rows of a batch on their way through one layer."""

    x: torch.Tensor
    """Input."""
    seen: torch.Tensor
    """The same as the factors see it: with dropout."""
    y: torch.Tensor
    """Output of the frozen layer."""
    turned: torch.Tensor
    """Its output for `seen`, where DoRA needs it; else `y`."""

    def split(self, counts: list[int]) -> list[_Inputs]:
        """Divide the rows by owner."""
        parts = (torch.split(one, counts) for one in (self.x, self.seen, self.y, self.turned))
        return [_Inputs(*own) for own in zip(*parts, strict=True)]


class LoraLayer(nn.Module):
    """A frozen linear layer with factors by slot."""

    def __init__(self, base: nn.Module, key: Key, scale: float, routing: Routing) -> None:
        super().__init__()
        self.base = base
        self.key = key
        self.scale = scale
        self.slots: dict[str, SlotFactors] = {}
        self._routing = routing
        self._stacked: tuple[list[object], list[SlotFactors | None], FactorStack] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, in) -> (B, T, out)."""
        y: torch.Tensor = self.base(x)
        half = current_pass() if x.dtype == HALF else None
        if half is None:
            return self._updated(x, y, self.base)
        return half.enter(self._updated(half.leave(x), half.leave(y), self._base_in(half)))

    def _updated(
        self, x: torch.Tensor, y: torch.Tensor, base: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Return the output with the update of each row's owner."""
        counts = self._counts(x)
        owners = [None if slot is None else self.slots[slot] for slot, _ in self._routing.rows]
        # the input as the factors see it, and the output of W that DoRA turns
        seen, turned = x, y
        if self._routing.dropout:
            seen = dropped(x, self._routing.dropout, self.key)
            if any(one is not None and one.magnitude is not None for one in owners):
                turned = base(seen)
        inputs = _Inputs(x, seen, y, turned)
        # one owner
        if len(owners) == 1:
            return self._adapted(inputs, owners[0])
        # several owners: their products in one
        update = self._update_together(seen, y.shape[-1], owners, counts)
        if update is not None:
            y = y + update.view_as(y)
            return self._with_folded(x, y, next(one for one in owners if one is not None))
        # owners that do not go together: one product for each
        parts = zip(owners, inputs.split(counts), strict=True)
        return torch.cat([self._adapted(part, one) for one, part in parts])

    def forget_stack(self) -> None:
        """Drop the stacked factors, which are kept from the last pass of several owners."""
        self._stacked = None

    def update_norm(self, slot: str) -> float:
        """Return an upper bound of the Frobenius norm of a slot's update of the weight."""
        one = self.slots[slot]
        norm = _product_norm(*one.all_rows())
        if one.folded is not None:
            norm += _product_norm(one.folded.A, one.folded.B)
        change = 0.0 if one.magnitude is None else float(one.magnitude.detach().to(CPU, torch.float64).norm())
        return self.scale * norm + change

    def _update_together(
        self, x: torch.Tensor, out: int, owners: Sequence[SlotFactors | None], counts: Sequence[int]
    ) -> torch.Tensor | None:
        """Return the update (N, out) from one product; None if the owners do not go together."""
        if not _go_together(owners):
            return None
        per_count = math.prod(x.shape[1:-1])  # 1 if (B, T) is flattened, else T
        tokens = [count * per_count for count in counts]
        kind = product_kind(tokens, (x.shape[-1], out), x)
        if kind is None:
            return None
        layout = row_layout(tuple(tokens), kind, x.device)
        return update_together(x.reshape(-1, x.shape[-1]), self._stack(owners, x), layout)

    def _stack(self, owners: Sequence[SlotFactors | None], x: torch.Tensor) -> FactorStack:
        """Return the stacked factors, those of the last pass if nothing has changed."""
        state: list[object] = [x.dtype, x.device]
        state += [None if one is None else (id(one), *one.changes()) for one in owners]
        kept = self._stacked
        if kept is None or kept[0] != state:
            parts = [[] if one is None else one.parts(self.scale) for one in owners]
            # the owners are kept, too: an id is theirs as long as they are
            kept = self._stacked = state, list(owners), FactorStack(parts, x)
        return kept[2]

    def _adapted(self, rows: _Inputs, slot: SlotFactors | None) -> torch.Tensor:
        """Return the output of one owner's rows."""
        if slot is None:
            return rows.y
        A, B = slot.all_rows()
        update = self._product(rows.seen, A, B)
        if slot.magnitude is not None:
            gain = direction_gain(self.base, A, B * self.scale, slot.magnitude)
            return rescaled(self.base, rows.y, rows.turned, update, gain)
        return self._with_folded(rows.x, rows.y + update, slot)

    def _base_in(self, half: Pass) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the frozen layer as a function of float32 numbers, within a pass in float16."""
        return lambda x: half.leave(self.base(half.enter(x)))

    def _with_folded(self, x: torch.Tensor, y: torch.Tensor, slot: SlotFactors) -> torch.Tensor:
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


def _moved(factor: nn.Parameter, device: torch.device) -> nn.Parameter:
    return nn.Parameter(factor.detach().to(device), requires_grad=factor.requires_grad)


def _copied(factor: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(factor.detach().clone(), requires_grad=factor.requires_grad)


def _product_norm(A: torch.Tensor, B: torch.Tensor) -> float:
    """Return the Frobenius norm of B A, without forming it: ||B A||^2 = sum of (B^T B) * (A A^T)."""
    A, B = A.detach().to(CPU, torch.float64), B.detach().to(CPU, torch.float64)  # not every device has it
    return math.sqrt(max(float(((B.mT @ B) * (A @ A.mT)).sum()), 0.0))


def _go_together(owners: Sequence[SlotFactors | None]) -> bool:
    """Return whether the products can be one: no owner twice, the same folded update, no magnitudes."""
    adapted = [one for one in owners if one is not None]
    if not adapted or len({id(one) for one in adapted}) < len(adapted):
        return False
    folded = adapted[0].folded
    if folded is not None and len(adapted) < len(owners):
        return False
    return all(one.magnitude is None and one.folded is folded for one in adapted)
