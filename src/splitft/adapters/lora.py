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
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from splitft.adapters.dora import rescaled
from splitft.adapters.state import Factors
from splitft.errors import AdapterError

CPU = torch.device("cpu")

Rows = Sequence[tuple[str | None, int]]
"""Owners of the rows of a batch, in order: (slot, sequences); slot None runs the base model."""


class Routing:
    """The slots of the current batch's rows; shared by all layers of a segment."""

    def __init__(self) -> None:
        self.rows: Rows = ()


@dataclass(frozen=True)
class SlotFactors:
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

    def __init__(self, base: nn.Module, scale: float, routing: Routing) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self.slots: dict[str, SlotFactors] = {}
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
        change = 0.0 if one.magnitude is None else float(one.magnitude.detach().to(CPU, torch.float64).norm())
        return self.scale * norm + change

    def _batched_product(self, x: torch.Tensor, slots: Sequence[SlotFactors]) -> torch.Tensor:
        """Return the small products of clients with equally many rows and equal ranks."""
        factors = [one.all_rows() for one in slots]
        A = torch.stack([A for A, _ in factors]).to(x.dtype)  # (clients, R, in)
        B = (torch.stack([B for _, B in factors]) * self.scale).to(x.dtype)  # (clients, out, R)
        small = torch.bmm(x.reshape(len(factors), -1, x.shape[-1]), A.mT)
        return torch.bmm(small, B.mT)

    def _adapted(self, x: torch.Tensor, y: torch.Tensor, slot: SlotFactors) -> torch.Tensor:
        A, B = slot.all_rows()
        update = self._product(x, A, B)
        if slot.magnitude is not None:
            return rescaled(self.base, y, update, A, B * self.scale, slot.magnitude)
        return self._with_folded(x, y + update, slot)

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


def _product_norm(A: torch.Tensor, B: torch.Tensor) -> float:
    """Return the Frobenius norm of B A, without forming it: ||B A||^2 = sum of (B^T B) * (A A^T)."""
    A, B = A.detach().to(CPU, torch.float64), B.detach().to(CPU, torch.float64)  # not every device has it
    return math.sqrt(max(float(((B.mT @ B) * (A @ A.mT)).sum()), 0.0))


def _can_be_batched(slots: Sequence[SlotFactors]) -> bool:
    """Return whether the products can be one: equal ranks, the same folded update, no magnitudes."""
    ranks = {one.A.shape[0] + (one.rest.rank if one.rest else 0) for one in slots}
    plain = all(one.magnitude is None and one.folded is slots[0].folded for one in slots)
    return plain and len(ranks) == 1
