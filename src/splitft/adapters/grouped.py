"""The small products of many clients, of any ranks and any numbers of rows, as few operations.

    rows of x by owner (N, in) --- A of its owner ---> (N, R) --- B of its owner ---> update (N, out)
    A of all owners            one stack (G, R, in), ranks padded with zeros to the largest
    transposed B of all        one stack (G, R, out), times the scale

    grouped     `torch._grouped_mm`: rows lie one owner after the other, `ends` says where each owner's end
    padded      batched product: rows padded to those of the largest owner, (G, M, in)

Stacking copies the factors, so a stack is kept until one of its factors changes. The backward pass computes
the gradients of both stacks, and every factor's `grad` becomes a view of them: with a node of autograd for
each factor, 64 clients would cost 64 times the operations.

Owners of equally many rows take the padded product, without padding. Others take `torch._grouped_mm` where it
is one kernel (bfloat16 on CUDA 9.0 and 10.0) or one call (CPU); it asks for rows of a multiple of 16 bytes.
Elsewhere rows are padded, but not on a CPU, where moving them takes longer than a loop
(`benchmarks/grouped_lora.py`). LoRA of several requests in one product: Punica, Chen et al. 2023,
https://arxiv.org/abs/2310.18547.

Shapes: G owners, N rows, M rows of the largest owner, R rank.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

ALIGNED_BYTES = 16
"""`torch._grouped_mm` takes matrices whose rows begin at multiples of this."""
MOST_PADDING = 2.0
"""Rows of a padded product over the rows that are there, at most."""
ONE_KERNEL = (9, 10)
"""Major compute capabilities for which `torch._grouped_mm` is one kernel; elsewhere on CUDA it waits for the
device and runs a loop."""


@dataclass(frozen=True)
class Part:
    """Rows of A and of transposed B that enter a stack together."""

    A: torch.Tensor
    """(R, in)."""
    Bt: torch.Tensor
    """(R, out)."""
    scale: float
    """Factor of B."""
    trained: tuple[torch.Tensor, torch.Tensor] | None = None
    """Parameters A and B to which the gradients belong; None for frozen rows."""


class RowLayout:
    """The rows of a batch by owner, and where they lie in the product."""

    def __init__(self, counts: Sequence[int], kind: str, device: torch.device) -> None:
        self.counts, self.kind = tuple(counts), kind
        self.rows, self.largest = sum(counts), max(counts)
        self.ends: torch.Tensor | None = None
        """(G,): end of each owner's rows."""
        self.places: torch.Tensor | None = None
        """(N,): place of each row among the padded ones; None if there is no padding."""
        if kind == "grouped":
            self.ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=device)
        elif self.rows < self.largest * len(counts):
            places = [self.largest * g + row for g, count in enumerate(counts) for row in range(count)]
            self.places = torch.tensor(places, device=device)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (G, M, D), padded with zeros; grouped rows stay as they are."""
        if self.ends is not None:
            return x.contiguous()
        if self.places is None:
            return x.reshape(len(self.counts), self.largest, x.shape[1])
        padded = x.new_zeros(len(self.counts) * self.largest, x.shape[1])
        return padded.index_copy_(0, self.places, x).view(len(self.counts), self.largest, x.shape[1])

    def gather(self, y: torch.Tensor) -> torch.Tensor:
        """(G, M, D) -> (N, D)."""
        if self.ends is not None:
            return y
        y = y.view(-1, y.shape[-1])
        return y if self.places is None else y.index_select(0, self.places)

    def product(self, x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Return spread rows times each owner's matrix (G, in, out)."""
        if self.ends is not None:
            return torch._grouped_mm(x, factors, offs=self.ends)
        return torch.bmm(x, factors)

    def outer(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return a^T b of each owner's spread rows: (G, D_a, D_b)."""
        if self.ends is not None:
            return torch._grouped_mm(a.mT, b, offs=self.ends)
        return torch.bmm(a.mT, b)


@functools.lru_cache(64)
def row_layout(counts: tuple[int, ...], kind: str, device: torch.device) -> RowLayout:
    """Return the layout of these numbers of rows, the same one for all layers and passes."""
    return RowLayout(counts, kind, device)


class FactorStack:
    """The factors of several owners on one layer: one tensor for A, one for B."""

    def __init__(self, owners: Sequence[Sequence[Part]], like: torch.Tensor) -> None:
        """Stack each owner's parts; `like` has the type and device of the product's rows."""
        self._parts = [part for owner in owners for part in owner]
        # rows of parts and of padding in turn, as they lie in the stack
        unit = ALIGNED_BYTES // like.element_size()
        ranks = [[part.A.shape[0] for part in owner] for owner in owners]
        rank = max(1, -(-max(map(sum, ranks)) // unit)) * unit
        self._sizes = [size for own in ranks for size in (*own, rank - sum(own))]
        self._shape = len(owners), rank
        self._places = _places(tuple(map(sum, ranks)), rank, like.device)
        self._factors = [part for owner in owners for part in (*(one.trained for one in owner), None)]
        first = self._parts[0]
        scales = [scale for owner in owners for scale in (*(part.scale for part in owner), first.scale)]
        runs = tuple(zip(self._sizes, scales, strict=True))
        self._scale = _scale_of_rows(runs, len(owners), first.A.dtype, like.device)
        with torch.no_grad():
            self.A = self._stack([part.A for part in self._parts], like.dtype)  # (G, R, in)
            self.Bt = (self._stack([part.Bt for part in self._parts]) * self._scale).to(like.dtype)
        trained = [pair for pair in self._factors if pair is not None]
        self.trains_a, self.trains_b = (
            any(pair[which].requires_grad for pair in trained) for which in (0, 1)
        )

    def trigger(self) -> torch.Tensor | None:
        """Return a factor that wants a gradient, so that the backward pass comes by; None if none does."""
        pairs = [pair for pair in self._factors if pair is not None]
        return next((factor for pair in pairs for factor in pair if factor.requires_grad), None)

    def add_gradients(self, of_a: torch.Tensor | None, of_bt: torch.Tensor | None) -> None:
        """Add the gradients of the stacks (G, R, in) and (G, R, out) to those of the factors."""
        sums: list[torch.Tensor] = []
        terms: list[torch.Tensor] = []
        dtype = self._parts[0].A.dtype
        views: tuple[torch.Tensor, ...]
        for which, gradient in ((0, of_a), (1, of_bt)):
            if gradient is None:
                continue
            rows = gradient.to(dtype) * self._scale if which else gradient.to(dtype)
            rows = rows.view(-1, gradient.shape[2])
            # B lies in memory like its transpose, and so does its gradient
            views = torch.split(rows.mT, self._sizes, 1) if which else torch.split(rows, self._sizes)
            for pair, view in zip(self._factors, views, strict=True):
                if pair is None or not (factor := pair[which]).requires_grad:
                    continue
                if factor.grad is None:
                    factor.grad = view
                else:
                    sums.append(factor.grad)
                    terms.append(view)
        if sums:
            torch._foreach_add_(sums, terms)

    def _stack(self, parts: list[torch.Tensor], dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return (G, R, width) of rows (R, width), padded with zeros."""
        owners, rank = self._shape
        if self._places is None:
            return torch.cat(parts).to(dtype).view(owners, rank, parts[0].shape[1])
        rows = torch.cat([*parts, _zeros(parts[0].shape[1], parts[0].dtype, parts[0].device)]).to(dtype)
        return functional.embedding(self._places, rows)  # one operation


@functools.lru_cache(256)
def _places(ranks: tuple[int, ...], rank: int, device: torch.device) -> torch.Tensor | None:
    """Return for each row of a stack (G, R) its place among the rows that are there; None for all of them.

    Padding has the place after the last.
    """
    if min(ranks) == rank:
        return None
    starts, last = accumulate(ranks, initial=0), sum(ranks)
    places = [
        [start + row if row < own else last for row in range(rank)]
        for own, start in zip(ranks, starts, strict=False)
    ]
    return torch.tensor(places, device=device)


@functools.lru_cache(64)
def _zeros(width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(1, width, dtype=dtype, device=device)


@functools.lru_cache(256)
def _scale_of_rows(
    runs: tuple[tuple[int, float], ...], owners: int, dtype: torch.dtype, device: torch.device
) -> float | torch.Tensor:
    """Return the factor of B from runs of rows: one number, or (G, R, 1) where they differ."""
    scales = {scale for _, scale in runs}
    if len(scales) == 1:
        return scales.pop()
    by_row = [scale for rows, scale in runs for _ in range(rows)]
    return torch.tensor(by_row, dtype=dtype, device=device).view(owners, -1, 1)


class _Together(torch.autograd.Function):
    """The update (N, out) of rows x (N, in); the gradients of the factors are added in place."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, trigger: torch.Tensor | None, stack: FactorStack, layout: RowLayout
    ) -> torch.Tensor:
        spread = layout.spread(x)
        small = layout.product(spread, stack.A.mT)
        ctx.save_for_backward(spread, small)
        ctx.stack, ctx.layout = stack, layout
        return layout.gather(layout.product(small, stack.Bt))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_update: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        stack, layout = ctx.stack, ctx.layout
        spread, small = ctx.saved_tensors
        of_update = layout.spread(of_update)
        of_small = layout.product(of_update, stack.Bt.mT)
        stack.add_gradients(
            layout.outer(of_small, spread) if stack.trains_a else None,
            layout.outer(small, of_update) if stack.trains_b else None,
        )
        of_x = layout.gather(layout.product(of_small, stack.A)) if ctx.needs_input_grad[0] else None
        return of_x, None, None, None


def update_together(x: torch.Tensor, stack: FactorStack, layout: RowLayout) -> torch.Tensor:
    """Return the update (N, out) of all owners' rows x (N, in)."""
    update: torch.Tensor = _Together.apply(x, stack.trigger(), stack, layout)  # type: ignore[no-untyped-call]
    return update


def product_kind(counts: Sequence[int], widths: Sequence[int], like: torch.Tensor) -> str | None:
    """Return the quickest product for owners of these numbers of rows; None for one after the other.

    `widths` are those of the layer, in and out; `like` has the type and device of the rows.
    """
    padding = max(counts) * len(counts) / sum(counts)
    if padding == 1:
        return "padded"
    aligned = all(width * like.element_size() % ALIGNED_BYTES == 0 for width in widths)
    if aligned and grouped_mm_works(like.device, like.dtype):
        return "grouped"
    return "padded" if padding <= MOST_PADDING and like.device.type != "cpu" else None


@functools.cache
def grouped_mm_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether `torch._grouped_mm` is one call, and right, for this device and type."""
    if device.type not in ("cpu", "cuda") or not hasattr(torch, "_grouped_mm"):
        return False
    if device.type == "cuda":
        one_kernel = torch.cuda.get_device_capability(device)[0] in ONE_KERNEL
        if not one_kernel or dtype != torch.bfloat16:
            return False
    # the mode of both products of a pass: rows by owner, and sums over an owner's rows
    a = torch.arange(24.0, device=device).view(3, 8).to(dtype)
    factors = torch.arange(128.0, device=device).view(2, 8, 8).to(dtype)
    try:
        ends = torch.tensor([1, 3], dtype=torch.int32, device=device)
        rows = torch._grouped_mm(a, factors, offs=ends)
        outer = torch._grouped_mm(a.mT, a, offs=ends)
    except (RuntimeError, NotImplementedError):
        return False
    expected_rows = torch.cat([a[:1] @ factors[0], a[1:] @ factors[1]])
    expected = torch.stack([a[:1].mT @ a[:1], a[1:].mT @ a[1:]])
    return torch.allclose(rows, expected_rows, rtol=0.02) and torch.allclose(outer, expected, rtol=0.02)


def note_change(factor: torch.Tensor) -> None:
    """Note that a factor was changed in place by a kernel that does not count it (fused optimizers)."""
    factor.changes = changes(factor)[1] + 1  # type: ignore[attr-defined]


def changes(factor: torch.Tensor) -> tuple[int, int]:
    """Return two numbers that rise when a factor is changed in place."""
    return factor._version, getattr(factor, "changes", 0)
