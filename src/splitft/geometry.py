"""Describe a split by integers: spans of blocks, cuts, ranks by block.

    block      0   1   2   3   4   5   6   7
               [---- client ---)[--- server ---)      cut k = 3
    rank      16  16   8   8  16  16  16  16          rank_at_cut = 8 on both sides, cut_span = 1

L blocks are numbered from 0. A cut k gives the client the embedding and blocks [0, k), the server
blocks [k, L). With labels on the client (the U-shape) the head, final norm and output matrix, is on
the client too; with labels on the server it is there. No torch here.

`head_positions` says how many positions the head works on at one time: their logits, V numbers each, must fit
a budget of memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from splitft.errors import GeometryError

Side = Literal["client", "server"]

HEAD_BYTES = 512 * 10**6
"""Most memory of the logits that exist at one time, with the arrays of their loss and gradient."""
HEAD_POSITIONS = 256
"""Most positions whose logits exist at one time: more make the head no faster."""
LOGITS_COPIES = 2
"""Arrays of logits in float32 at least: themselves, and their log-probabilities, then the gradient."""


@dataclass(frozen=True, order=True)
class Span:
    """Blocks [start, stop), by absolute index."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise GeometryError(f"span [{self.start}, {self.stop}) is not a range of blocks")

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __contains__(self, block: object) -> bool:
        return isinstance(block, int) and self.start <= block < self.stop

    def minus(self, other: Span) -> tuple[int, ...]:
        """Return the blocks of this span that are not in `other`."""
        return tuple(block for block in self if block not in other)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only language model, for costs and checks."""

    family: str
    """Hugging Face `model_type`, such as llama or gpt2."""
    blocks: int
    """L, the number of transformer blocks."""
    width: int
    """D, the size of a hidden state."""
    vocab: int
    """V, the number of rows of the embedding."""
    inner: int
    """Width of the feed-forward layer."""
    heads: int
    """Attention heads."""
    kv_heads: int
    """Key and value heads; equal to `heads` without grouped-query attention."""
    tied: bool
    """True if the output matrix is the embedding."""
    max_positions: int
    """Longest supported sequence, in tokens."""
    head_width: int | None = None
    """Width of an attention head where it is not `width` / `heads` (Qwen3)."""

    @property
    def query_width(self) -> int:
        """Width of all heads' queries together."""
        return self.heads * (self.head_width or self.width // self.heads)

    @property
    def kv_width(self) -> int:
        """Width of all keys, and of all values."""
        return self.kv_heads * (self.head_width or self.width // self.heads)


@dataclass(frozen=True)
class Plan:
    """The parts of a model of L blocks on one client and on the server."""

    cut: int
    """k: the client holds the embedding and blocks [0, k)."""
    blocks: int
    """L."""
    labels: Side = "client"
    """Side of the labels, and so of the head and the loss."""

    def __post_init__(self) -> None:
        check_cut(self.cut, self.blocks)

    @property
    def client(self) -> Span:
        """Blocks of the client."""
        return Span(0, self.cut)

    @property
    def server(self) -> Span:
        """Blocks of the server."""
        return Span(self.cut, self.blocks)


def check_cut(cut: int, blocks: int, whole_allowed: bool = True) -> int:
    """Return `cut` if it leaves the client at least one block, else raise GeometryError.

    `cut == blocks` is the whole model on the client (federated LoRA); with `whole_allowed=False` the server
    needs a block, too.
    """
    deepest = blocks if whole_allowed else blocks - 1
    if deepest < 1:
        raise GeometryError(f"cut {cut}: a model of {blocks} block cannot be split")
    if not 1 <= cut <= deepest:
        lacks = "the client no blocks" if cut < 1 else "the server no blocks"
        raise GeometryError(f"cut {cut} leaves {lacks}: the model has {blocks} blocks; choose 1 to {deepest}")
    return cut


def ranks_by_block(
    cut: int,
    blocks: int,
    rank: int,
    rank_at_cut: int | None = None,
    cut_span: int = 1,
    cut_sides: Sequence[Side] = ("client", "server"),
) -> tuple[int, ...]:
    """Return the LoRA rank of each of the L blocks for a client with this cut (SplitFT, arXiv 2604.26388).

    `cut_span` blocks on each side named in `cut_sides` have `rank_at_cut`; all others have `rank`. A whole
    model on the client (cut = L) has no boundary, hence no lowered rank.
    """
    check_cut(cut, blocks)
    ranks = [rank] * blocks
    if rank_at_cut is None or cut == blocks:
        return tuple(ranks)
    if "client" in cut_sides:
        for block in range(max(0, cut - cut_span), cut):
            ranks[block] = rank_at_cut
    if "server" in cut_sides:
        for block in range(cut, min(blocks, cut + cut_span)):
            ranks[block] = rank_at_cut
    return tuple(ranks)


def logits_bytes(vocab: int, weight_bytes: int) -> int:
    """Return the memory of one position's logits while loss and gradient are computed."""
    narrow = weight_bytes if weight_bytes < 4 else 0  # the logits as the output matrix gives them
    return vocab * (LOGITS_COPIES * max(4, weight_bytes) + narrow)


def head_positions(vocab: int, weight_bytes: int) -> int:
    """Return the number of positions whose logits may exist at one time: within HEAD_BYTES, at least one."""
    return max(1, min(HEAD_POSITIONS, HEAD_BYTES // logits_bytes(vocab, weight_bytes)))
