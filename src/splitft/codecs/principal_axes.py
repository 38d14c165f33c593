"""Principal axes of a stream, learnt from its rows, and again each time there are three times as many.

    rows in units of their rms --> count, sum, outer product (the sender keeps them)
                               --> mean, axes by falling energy, spread along each (both ends have them)

Of n rows of width D the covariance is known to about D/n: the axes of least energy are those of chance, and
rows that come later have more energy along them than those that were learnt from. So axes are learnt again
while the stream goes on, at intervals that grow as fast as it does; and the covariance is drawn in towards
one that is the same in all directions (Ledoit and Wolf 2004, A well-conditioned estimator for
large-dimensional covariance matrices), by less the more rows there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from splitft.codecs import entropy_coder as entropy
from splitft.codecs.passage import Memory
from splitft.codecs.rotation import attention_sinks

LEARNT_ROWS = 2
"""Rows that axes are first learnt from, over the width."""
AGAIN = 3
"""They are learnt again when there are this many times as many rows."""
DRAWN_IN = 0.1
"""How far the covariance is drawn in, over D / n."""
LEAST_SPREAD = 0.1
"""Axes of less spread, in steps, are not coded: they are nought."""
WIDEST = 16.0
"""Of numbers with more spread, in steps, the low bits are split off."""


@dataclass(frozen=True)
class Axes:
    """What was learnt of a stream, as both ends have it."""

    basis: torch.Tensor
    """(D, D): a column for each axis."""
    mean: torch.Tensor
    """(D,)."""
    spread: torch.Tensor
    """(D,): standard deviation along each axis."""

    @classmethod
    def of(cls, codes: torch.Tensor, facts: torch.Tensor) -> Axes:
        """From int8 columns (D, D) and (3, D): their scales, the mean, the spreads."""
        return cls(codes.float() * facts[0], facts[1], facts[2])

    def grid(self, step: float) -> Grid:
        """How rows are coded with this step."""
        coded = self.spread >= LEAST_SPREAD * step
        spread: np.ndarray = self.spread[coded].double().numpy() / step
        low = np.clip(np.ceil(np.log2(spread / WIDEST)), 0, entropy.MOST_BITS).astype(np.int16)
        classes = np.concatenate([entropy.class_of(spread / 2.0**low), entropy.CLASSES + low[low > 0]])
        return Grid(step, coded, torch.from_numpy(low), classes)


@dataclass(frozen=True)
class Grid:
    """Steps along axes, and how whole numbers of them become lines of the entropy code.

    Numbers along an axis of large spread have `low` bits that are all as likely, with lines of their own.
    """

    step: float
    coded: torch.Tensor
    """(D,): which A axes have enough spread to be coded."""
    low: torch.Tensor
    """(A,): bits that are split off."""
    classes: entropy.Integers
    """(A + B,): of the lines; B axes have bits split off."""

    def within(self, codes: torch.Tensor) -> torch.Tensor:
        """(N,): whether all of a row's codes (N, A) can be coded."""
        return (codes.abs() <= entropy.LARGEST * 2.0**self.low).all(1)

    def lines(self, codes: torch.Tensor) -> np.ndarray:
        """Whole numbers (N, A) -> (N, A + B)."""
        whole = codes.to(torch.int16)
        split = self.low > 0
        bits = whole[:, split] & (2 ** self.low[split] - 1)
        return torch.cat([whole >> self.low, bits], 1).numpy()

    def numbers(self, lines: np.ndarray) -> torch.Tensor:
        """The inverse, in steps: (N, D), nought along axes that are not coded."""
        whole, split = torch.from_numpy(lines), self.low > 0
        codes = whole[:, : len(self.low)] << self.low
        codes[:, split] |= whole[:, len(self.low) :]
        numbers = torch.zeros(len(lines), len(self.coded))
        numbers[:, self.coded] = codes.float() * self.step
        return numbers

    def bits(self, codes: torch.Tensor) -> float:
        """Bits that codes (N, A) take, all together, but for the lanes' states."""
        most = entropy.LARGEST * 2.0**self.low
        return entropy.taken_bits(self.lines(codes.clamp(-most, most)).T, self.classes)


def learn(rows: torch.Tensor, memory: Memory) -> bool:
    """Take in rows (N, D); whether `basis` and `facts` of the memory are new by that.

    Also kept there: `count`, `sum` (D,) and `outer` (D, D) of all rows so far, and `due`, the count at
    which axes are learnt next.
    """
    width = rows.shape[1]
    rows = rows[~attention_sinks(rows)]
    u = rows / rows.square().mean(1).sqrt().clamp_min(1e-30)[:, None]
    fresh = {"count": torch.tensor(float(len(u))), "sum": u.sum(0), "outer": u.T @ u}
    for name, value in fresh.items():
        memory[name] = memory[name] + value if name in memory else value
    count = float(memory["count"])
    if count < float(memory.get("due", torch.tensor(float(LEARNT_ROWS * width)))):
        return False
    memory["due"] = torch.tensor(AGAIN * count)
    mean = memory["sum"].double() / count
    covariance = memory["outer"].double() / count - torch.outer(mean, mean)
    share = min(1.0, DRAWN_IN * width / count)
    drawn = (1 - share) * covariance + share * covariance.diagonal().mean() * torch.eye(width)
    energy, axes = torch.linalg.eigh(drawn)
    columns = axes.abs().amax(0) / 127
    memory["basis"] = (axes / columns).round().to(torch.int8)
    memory["facts"] = torch.stack([columns, mean, energy.clamp_min(1e-12).sqrt()]).float()
    return True
