"""Principal axes of a stream, learned from its rows, and again each time their number has tripled.

    rows in units of their rms --> count, sum, outer product (the sender keeps them)
                               --> mean, axes, spread along each axis (both ends have them)

The relative error of a covariance from n rows of width D is about D/n: the axes of least energy are noise,
and later rows have more energy along them. So axes are learned again at intervals that grow with the stream,
and the covariance is shrunk towards a multiple of the identity, by less the more rows there are (Ledoit and
Wolf 2004, A well-conditioned estimator for large-dimensional covariance matrices).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from splitft.codecs import entropy_coder as entropy
from splitft.codecs.encoded import Memory
from splitft.codecs.rotation import attention_sinks

FIRST_ROWS = 2
"""Rows that axes are first learned from, as a multiple of the width."""
GROWTH = 3
"""Axes are learned again when there are this many times as many rows."""
SHRINKAGE = 0.1
"""Shrinkage of the covariance, as a multiple of D / n."""
LEAST_SPREAD = 0.1
"""Axes of less spread, in steps, are not coded: their numbers are decoded as 0."""
WIDEST = 16.0
"""Numbers of more spread, in steps, have their low bits split off."""


@dataclass(frozen=True)
class Axes:
    """Mean, principal axes and spreads of a stream, as both ends have them."""

    basis: torch.Tensor
    """(D, D), a column for each axis."""
    mean: torch.Tensor
    """(D,)."""
    spread: torch.Tensor
    """(D,), standard deviation along each axis."""

    @classmethod
    def of(cls, codes: torch.Tensor, facts: torch.Tensor) -> Axes:
        """Read int8 columns (D, D), and `facts` (3, D): scales of the columns, mean, spreads."""
        return cls(codes.float() * facts[0], facts[1], facts[2])

    def grid(self, step: float) -> Grid:
        """Return how rows are coded with this step."""
        coded = self.spread >= LEAST_SPREAD * step
        spread: np.ndarray = self.spread[coded].double().numpy() / step
        low = np.clip(np.ceil(np.log2(spread / WIDEST)), 0, entropy.MOST_BITS).astype(np.int16)
        classes = np.concatenate([entropy.class_of(spread / 2.0**low), entropy.CLASSES + low[low > 0]])
        return Grid(step, coded, torch.from_numpy(low), classes)


@dataclass(frozen=True)
class Grid:
    """Quantization along axes, and the order of the integers in the entropy code.

    Numbers along an axis of large spread have `low` bits, which are uniform and coded separately. A line of
    the entropy code is an axis, or the low bits of an axis.
    """

    step: float
    coded: torch.Tensor
    """(D,), which A axes have enough spread to be coded."""
    low: torch.Tensor
    """(A,), bits that are split off."""
    classes: entropy.Integers
    """(A + B,), entropy classes of the lines; B axes have low bits."""

    def within(self, codes: torch.Tensor) -> torch.Tensor:
        """Return (N,) whether all codes of a row of (N, A) can be coded."""
        return (codes.abs() <= entropy.LARGEST * 2.0**self.low).all(1)

    def lines(self, codes: torch.Tensor) -> np.ndarray:
        """Split integers (N, A) into the lines (N, A + B)."""
        whole = codes.to(torch.int16)
        split = self.low > 0
        bits = whole[:, split] & (2 ** self.low[split] - 1)
        return torch.cat([whole >> self.low, bits], 1).numpy()

    def numbers(self, lines: np.ndarray) -> torch.Tensor:
        """Invert `lines`; returns (N, D) times the step, 0 along axes that are not coded."""
        whole, split = torch.from_numpy(lines), self.low > 0
        codes = whole[:, : len(self.low)] << self.low
        codes[:, split] |= whole[:, len(self.low) :]
        numbers = torch.zeros(len(lines), len(self.coded))
        numbers[:, self.coded] = codes.float() * self.step
        return numbers

    def bits(self, codes: torch.Tensor) -> float:
        """Return the bits that codes (N, A) take in all, without the states of the lanes."""
        most = entropy.LARGEST * 2.0**self.low
        return entropy.taken_bits(self.lines(codes.clamp(-most, most)).T, self.classes)


def learn(rows: torch.Tensor, memory: Memory) -> bool:
    """Add rows (N, D) to the statistics; returns whether `basis` and `facts` in the memory are new.

    The memory also has `count`, `sum` (D,) and `outer` (D, D) of all rows so far, and `due`, the count at
    which axes are learned next.
    """
    width = rows.shape[1]
    rows = rows[~attention_sinks(rows)]
    u = rows / rows.square().mean(1).sqrt().clamp_min(1e-30)[:, None]
    fresh = {"count": torch.tensor(float(len(u))), "sum": u.sum(0), "outer": u.T @ u}
    for name, value in fresh.items():
        memory[name] = memory[name] + value if name in memory else value
    count = float(memory["count"])
    if count < float(memory.get("due", torch.tensor(float(FIRST_ROWS * width)))):
        return False
    memory["due"] = torch.tensor(GROWTH * count)
    mean = memory["sum"].double() / count
    covariance = memory["outer"].double() / count - torch.outer(mean, mean)
    share = min(1.0, SHRINKAGE * width / count)
    shrunk = (1 - share) * covariance + share * covariance.diagonal().mean() * torch.eye(width)
    energy, axes = torch.linalg.eigh(shrunk)
    columns = axes.abs().amax(0) / 127
    memory["basis"] = (axes / columns).round().to(torch.int8)
    memory["facts"] = torch.stack([columns, mean, energy.clamp_min(1e-12).sqrt()]).float()
    return True
