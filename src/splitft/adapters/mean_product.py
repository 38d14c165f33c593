"""Work with the mean product of any number of clients, in time that grows with their number, not its square.

    M = sum_i w_i B_i A_i     (out, in)        S = sum_i r_i, the rank of the stacked factors
    M X = sum_i w_i B_i (A_i X)                for k columns X: k S (in + out) multiply-adds

QR of the stacked factors gives every norm and singular value of M to rounding (`adapters.factoring`), in a
time that grows with S^2: minutes for 100 clients at rank 16 and the shapes of an 8B model. So factors are
stacked up to a rank of `MOST_STACKED` only. Beyond it, M is compressed by products with a few columns:

    best factors   subspace iteration from random columns, until it captures no more
                   (Halko et al. 2011, https://arxiv.org/abs/0909.4061)
    norms          a subspace exactly and the rest from random signs, within about one per cent: Hutch++
                   (Meyer et al. 2021, https://arxiv.org/abs/2010.09649)

Where S exceeds a layer's full rank the matrix itself is the smaller: it is summed up, and its norm is exact.
The members are read one at a time, or `STACK` ranks at a time, so memory does not grow with their number. The
random numbers have a fixed seed: the result depends on the members alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from splitft.adapters.factoring import product_norm, stacked
from splitft.adapters.members import Weighted
from splitft.adapters.state import Factors

MOST_STACKED = 256
"""Largest rank of stacked factors that are decomposed by QR."""
STACK = 256
"""Rank of the stacks that are added up to a matrix: products of low rank would be slow, one stack large."""
EXTRA_COLUMNS = 16
"""Columns of a subspace beyond the wanted rank (Halko et al. recommend 5 to 10; more converge sooner)."""
MOST_PASSES = 4
"""Most rounds of subspace iteration."""
STANDSTILL = 1e-5
"""Relative gain in captured energy below which subspace iteration ends."""
PROBES = 32
"""Columns of each of a norm's two parts."""


class MeanProduct:
    """The matrix M = sum_i w_i B_i A_i, by its products."""

    def __init__(self, members: Weighted) -> None:
        first = members[0][1]
        self.members, self.device = members, first.A.device
        self.dtype = torch.promote_types(first.A.dtype, torch.float32)
        self.outputs, self.inputs = first.B.shape[0], first.A.shape[1]
        self.stacked_rank = stacked_rank(members)

    @property
    def full(self) -> bool:
        """True if the matrix has no more numbers than its stacked factors."""
        numbers = self.outputs * self.inputs
        return self.stacked_rank * (self.outputs + self.inputs) >= numbers

    def times(self, columns: torch.Tensor) -> torch.Tensor:
        """Return M X (out, k) of columns X (in, k)."""
        total = columns.new_zeros(self.outputs, columns.shape[1])
        for weight, B, A in self._each():
            total.addmm_(B, A @ columns, alpha=weight)
        return total

    def transposed_times(self, columns: torch.Tensor) -> torch.Tensor:
        """Return M^T Y (in, k) of columns Y (out, k)."""
        total = columns.new_zeros(self.inputs, columns.shape[1])
        for weight, B, A in self._each():
            total.addmm_(A.T, B.T @ columns, alpha=weight)
        return total

    def dense(self) -> torch.Tensor:
        """Return the matrix (out, in)."""
        total = torch.zeros(self.outputs, self.inputs, dtype=self.dtype, device=self.device)
        for B, A in self._stacks():
            total.addmm_(B, A)
        return total

    def factors(self) -> Factors:
        """Return factors of the matrix, of the stacked rank or of full rank, whichever is smaller."""
        if self.stacked_rank >= min(self.outputs, self.inputs):
            dense = self.dense()
            one = torch.eye(min(dense.shape), dtype=self.dtype, device=self.device)
            return Factors(dense, one) if self.outputs <= self.inputs else Factors(one, dense)
        stacks = list(self._stacks())
        return Factors(torch.cat([A for _, A in stacks]), torch.cat([B for B, _ in stacks], 1))

    def _each(self) -> Iterator[tuple[float, torch.Tensor, torch.Tensor]]:
        for weight, factors in self.members:
            yield weight, factors.B.to(self.dtype), factors.A.to(self.dtype)

    def _stacks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield stacked factors of some members: B' (out, s) with the weights, A' (s, in)."""
        Bs: list[torch.Tensor] = []
        As: list[torch.Tensor] = []
        rank = 0
        for weight, B, A in self._each():
            Bs.append(weight * B)
            As.append(A)
            rank += len(A)
            if rank >= STACK:
                yield torch.cat(Bs, 1), torch.cat(As)
                Bs, As, rank = [], [], 0
        if rank:
            yield torch.cat(Bs, 1), torch.cat(As)


def stacked_rank(members: Weighted) -> int:
    """Return the rank of the members' stacked factors."""
    return sum(factors.rank for _, factors in members)


def compressed(members: Weighted, rank: int) -> Factors:
    """Return factors of the mean product: its stack, or its leading directions, at least `rank` of them.

    Weights are at least 0; the factors have the members' type.
    """
    if stacked_rank(members) <= MOST_STACKED:
        B = torch.cat([math.sqrt(weight) * factors.B for weight, factors in members], 1)
        return Factors(torch.cat([math.sqrt(weight) * factors.A for weight, factors in members]), B)
    dtype, leading = members[0][1].A.dtype, _leading(MeanProduct(members), rank)
    return Factors(leading.A.to(dtype), leading.B.to(dtype))


def mean_norm(members: Weighted) -> float:
    """Return ||sum_i w_i B_i A_i|| in the Frobenius norm; weights may be negative.

    Exact up to `MOST_STACKED` and for layers of full rank; else within about one per cent.
    """
    product = MeanProduct(members)
    if product.stacked_rank <= MOST_STACKED:
        return product_norm(stacked(members))
    if product.full:
        return float(product.dense().norm())
    signs = _random_signs(product, 2 * PROBES)
    # the columns of a subspace near the leading directions, exactly
    subspace = torch.linalg.qr(product.transposed_times(product.times(signs[:, :PROBES]))).Q
    captured = product.times(subspace).double().square().sum()
    # the rest, from what it does to random signs: E ||M x||^2 = ||M||^2
    probes = signs[:, PROBES:]
    rest = product.times(probes - subspace @ (subspace.T @ probes)).double().square().sum() / PROBES
    return math.sqrt(float(captured + rest))


def _leading(product: MeanProduct, rank: int) -> Factors:
    """Return Q Q^T M, whose columns Q (out, k) span M's leading directions; k a little above `rank`."""
    columns = min(rank + EXTRA_COLUMNS, product.outputs, product.inputs)
    right = _random_signs(product, columns)
    captured = 0.0
    for _ in range(MOST_PASSES):
        left = torch.linalg.qr(product.times(right)).Q
        image = product.transposed_times(left)  # (in, k)
        before, captured = captured, float(torch.linalg.svdvals(image)[:rank].double().square().sum())
        if captured <= before * (1 + STANDSTILL):
            break
        right = torch.linalg.qr(image).Q
    return Factors(image.T, left)


def _random_signs(product: MeanProduct, columns: int) -> torch.Tensor:
    """Return random signs (in, columns), the same on every device."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (product.inputs, columns), generator=generator).mul_(2).sub_(1)
    return signs.to(device=product.device, dtype=product.dtype)
