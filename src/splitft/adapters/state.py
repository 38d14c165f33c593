"""LoRA factors as plain data, keyed by absolute block index and target.

    update of one linear layer = scale * B @ A        A (R, in), B (out, R), scale = alpha / rank

The key does not depend on the cut, so the blocks of a client and of the server fit together at every cut, and
moving a cut is moving keys. `scale` is one number for the run: a layer of lower rank keeps it, so that
lowering a rank never changes the size of an update (peft's `alpha_pattern` expresses the same on export).

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from splitft.errors import AdapterError
from splitft.geometry import Span

CPU = torch.device("cpu")
Key = tuple[int, str]
"""(absolute block, target path inside the block), such as (7, "self_attn.q_proj")."""


@dataclass(frozen=True)
class Factors:
    """A and B of one linear layer."""

    A: torch.Tensor
    """(R, in)."""
    B: torch.Tensor
    """(out, R)."""
    magnitude: torch.Tensor | None = None
    """(1, out): change of the rows' magnitudes from the base weight's (DoRA); None for LoRA."""

    def __post_init__(self) -> None:
        if self.A.dim() != 2 or self.B.dim() != 2 or self.A.shape[0] != self.B.shape[1]:
            raise AdapterError(
                f"A {tuple(self.A.shape)} and B {tuple(self.B.shape)} are not factors of one product"
            )
        if self.magnitude is not None and self.magnitude.shape != (1, self.B.shape[0]):
            found, out = tuple(self.magnitude.shape), self.B.shape[0]
            raise AdapterError(f"a magnitude {found} does not fit a layer of {out} outputs")

    @property
    def rank(self) -> int:
        """R."""
        return int(self.A.shape[0])

    def product(self) -> torch.Tensor:
        """Return B A (out, in); aggregation never forms it."""
        return self.B @ self.A

    @property
    def names(self) -> str:
        """Factors that are present: "AB", or one of them where another party keeps the other."""
        return ("A" if self.A.shape[1] else "") + ("B" if self.B.shape[0] else "")

    def select(self, names: str) -> Factors:
        """Return the factors of these names, "A", "B" or "AB"; another one is empty, of the same rank."""
        A = self.A if "A" in names else self.A.new_empty(self.rank, 0)
        if "B" in names:
            return Factors(A, self.B, self.magnitude)
        return Factors(A, self.B.new_empty(0, self.rank))

    def fill_from(self, other: Factors) -> Factors:
        """Return these factors, with the first rows of A or columns of B of `other` where one is empty."""
        A = self.A if self.A.shape[1] else other.A[: self.rank]
        if self.B.shape[0]:
            return replace(self, A=A)
        return Factors(A, other.B[:, : self.rank], other.magnitude)

    def first(self, rank: int) -> Factors:
        """Return the first rows of A and columns of B."""
        return Factors(self.A[:rank], self.B[:, :rank], self.magnitude)

    def beyond(self, rank: int) -> Factors:
        """Return the rows of A and columns of B from `rank` on."""
        return Factors(self.A[rank:], self.B[:, rank:])

    def to(self, device: torch.device) -> Factors:
        """Return the factors on a device; these themselves if they are there."""
        if self.A.device == device:
            return self
        magnitude = None if self.magnitude is None else self.magnitude.to(device)
        return Factors(self.A.to(device), self.B.to(device), magnitude)

    def followed_by(self, other: Factors) -> Factors:
        """Return the stacked factors, whose product is the sum of both products."""
        return replace(self, A=torch.cat([self.A, other.A]), B=torch.cat([self.B, other.B], 1))


class AdapterState(Mapping[Key, Factors]):
    """An immutable set of factors over some blocks, in order of block and target."""

    def __init__(self, factors: Mapping[Key, Factors] | None = None) -> None:
        self._factors = dict(sorted((factors or {}).items()))

    def __getitem__(self, key: Key) -> Factors:
        return self._factors[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)

    def within(self, blocks: Span | Iterable[int]) -> AdapterState:
        """Return the factors of these blocks."""
        wanted = set(blocks)
        return AdapterState({key: value for key, value in self.items() if key[0] in wanted})

    def union(self, other: AdapterState) -> AdapterState:
        """Return both sets. Raises AdapterError if they overlap."""
        both = self.keys() & other.keys()
        if both:
            raise AdapterError(f"two adapters for block {min(both)[0]}: the sets overlap")
        return AdapterState({**self, **other})

    def updated(self, other: AdapterState) -> AdapterState:
        """Return both sets; the factors of `other` replace those of this set where both have a layer."""
        return AdapterState({**self, **other})

    def select(self, names: str) -> AdapterState:
        """Return the factors of these names of every layer."""
        return AdapterState({key: factors.select(names) for key, factors in self.items()})

    def fill_from(self, other: AdapterState) -> AdapterState:
        """Return this set, with the factors of `other` where a layer has only one."""
        return AdapterState({
            key: factors if factors.names == "AB" else factors.fill_from(other[key])
            for key, factors in self.items()
        })  # fmt: skip

    def replace_B(self, own: AdapterState) -> AdapterState:  # noqa: N802 the factor is called B
        """Replace B by the B of `own` in the layers that both contain."""
        return AdapterState({
            key: Factors(factors.A, own[key].B) if key in own else factors for key, factors in self.items()
        })  # fmt: skip

    def ranks(self) -> dict[int, int]:
        """Return the rank of each block (the largest of its targets)."""
        ranks: dict[int, int] = {}
        for (block, _), factors in self.items():
            ranks[block] = max(factors.rank, ranks.get(block, 0))
        return ranks

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors by flat name: `7.self_attn.q_proj.A` and `.B`, with DoRA `.M`."""
        flat: dict[str, torch.Tensor] = {}
        for (block, target), factors in self.items():
            flat[f"{block}.{target}.A"], flat[f"{block}.{target}.B"] = factors.A, factors.B
            if factors.magnitude is not None:
                flat[f"{block}.{target}.M"] = factors.magnitude
        return flat

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> AdapterState:
        """Return the set of these tensors. Raises AdapterError for names or shapes that do not pair up.

        The inverse of `tensors`.
        """
        layers: dict[Key, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            head, _, factor = name.rpartition(".")
            block, _, target = head.partition(".")
            if factor not in ("A", "B", "M") or not target or not _is_block(block):
                raise AdapterError(f"{name!r} is not the name of an adapter factor")
            layers.setdefault((int(block), target), {})[factor] = tensor
        for key, pair in layers.items():
            if pair.keys() - {"M"} != {"A", "B"}:
                raise AdapterError(f"block {key[0]} {key[1]}: only factor {next(iter(pair))} is given")
        return cls({key: Factors(pair["A"], pair["B"], pair.get("M")) for key, pair in layers.items()})

    def all_finite(self) -> bool:
        """Return whether every number is finite."""
        return all(bool(torch.isfinite(tensor).all()) for tensor in self.tensors().values())


def _is_block(text: str) -> bool:
    """Return whether a text is a block index in its canonical form: `7`, not `07`."""
    return len(text) < 7 and text.isascii() and text.isdigit() and text == str(int(text))


def with_mean_of_own(state: AdapterState, own: Iterable[AdapterState]) -> AdapterState:
    """Return global factors with the mean of the clients' own B, in layers for which some are known."""
    sets = list(own)
    known = {key: torch.stack([one[key].B for one in sets if key in one]) for key in set().union(*sets)}
    means = {key: replace(state[key], B=stacked.mean(0)) for key, stacked in known.items()}
    return state.updated(AdapterState(means))


def fresh_rows(
    key: Key, rows: int, width: int, seed: int, *, salt: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return new rows of A (rows, width), as peft initialises them: Kaiming-uniform with a = sqrt(5).

    That is uniform in +-1/sqrt(width). The numbers depend on the key, seed and salt alone, so that every
    party computes the same ones, at every cut.
    """
    mixed = zlib.crc32(f"{seed}/{salt}/{key[0]}/{key[1]}".encode())
    generator = torch.Generator().manual_seed(mixed)
    bound = 1 / math.sqrt(width)
    return (torch.rand(rows, width, generator=generator, dtype=torch.float32) * 2 - 1).mul_(bound).to(dtype)


def initial_state(
    sizes: Mapping[Key, tuple[int, int]],
    ranks: Mapping[int, int],
    seed: int,
    dtype: torch.dtype,
    salt: int = 0,
    dora: bool = False,
) -> AdapterState:
    """Return adapters before training: A random, B zero, so that the model starts as the base model.

    `sizes` gives (in, out) of each adapted layer, `ranks` the rank of each block; another `salt` (the round)
    gives other rows. With `dora` each layer has a change of magnitude, zero at first.
    """
    factors: dict[Key, Factors] = {}
    for key, (width_in, width_out) in sizes.items():
        rank = ranks[key[0]]
        A = fresh_rows(key, rank, width_in, seed, salt=salt, dtype=dtype)
        magnitude = torch.zeros(1, width_out, dtype=dtype) if dora else None
        factors[key] = Factors(A, torch.zeros(width_out, rank, dtype=dtype), magnitude)
    return AdapterState(factors)
