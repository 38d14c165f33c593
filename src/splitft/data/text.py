"""Examples, and the batches of a step.

    examples -> held_out (holdout.py) -> training part  -> BatchStream -> batch(step)
                                    └--> held-out part -> eval_batches

An example is a sequence of tokens and the first token that carries loss. With Q prompt tokens and C
completion tokens the loss is on the completion only; position p of a sequence predicts token p + 1, so
the first labelled position is the last of the prompt:

    tokens      q0  q1  q2  c0  c1  eos            labelled_from = 3
    positions            2   3   4                 targets = c0 c1 eos

Plain text has labelled_from = 1: every token but the first is a target.

The cost of a batch is the number of its sequences times the longest, so sequences of similar length belong
together: an epoch is shuffled, sorted by length within windows of a few batches, cut into batches, and
the batches are shuffled again. The order depends on (seed, client, epoch) alone: a batch is a pure function
of the step, and a run that resumes needs only the step's number.

Shapes: B sequences, T tokens of the longest sequence in the batch, N labelled positions. Padding is on the
right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from splitft.errors import DataError
from splitft.seeds import Draw

Indices = NDArray[np.int64]
"""Indices of examples (n,)."""

PADDING = 0
"""Token id at padded positions; it is never read, because lengths accompany the tokens."""

WINDOW_BATCHES = 8
"""Batches sorted by length together: enough to waste little padding, few enough to mix an epoch."""


@dataclass(frozen=True)
class Example:
    """One sequence of tokens, and the first that carries loss."""

    tokens: tuple[int, ...]
    """Token ids, with the end-of-text token unless it was truncated."""
    labelled_from: int = 1
    """tokens[labelled_from:] carry loss; at least 1, because nothing predicts the first token."""
    label: str | None = None
    """Value of the column that shares may be divided by, such as a topic or a site."""
    truncated: bool = False
    """True if its text was longer than max_tokens."""

    def __post_init__(self) -> None:
        if not 1 <= self.labelled_from < len(self.tokens):
            raise DataError(
                f"an example of {len(self.tokens)} tokens cannot carry loss from token {self.labelled_from} "
                f"on: it needs at least 2 tokens, and labelled_from between 1 and the last"
            )

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Batch:
    """The sequences of one step, padded on the right to the longest."""

    tokens: Tensor
    """Token ids (B, T), int64."""
    lengths: tuple[int, ...]
    """Real tokens of each sequence; the rest of its row is padding."""
    labelled_from: tuple[int, ...]
    """For each sequence, the first token that carries loss."""
    numbers: tuple[int, ...] = ()
    """For each sequence, its example's number in the client's share; the same in every epoch."""

    @classmethod
    def of(cls, examples: Sequence[Example], numbers: Sequence[int] = ()) -> Batch:
        """Pad these examples into one batch, in the order given."""
        if not examples:
            raise DataError("a batch needs at least one example")
        lengths = tuple(len(example) for example in examples)
        tokens = torch.full((len(examples), max(lengths)), PADDING, dtype=torch.int64)
        for row, example in enumerate(examples):
            tokens[row, : lengths[row]] = torch.tensor(example.tokens, dtype=torch.int64)
        first = tuple(example.labelled_from for example in examples)
        return cls(tokens, lengths, first, tuple(map(int, numbers)))

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tokens on a device."""
        return replace(self, tokens=self.tokens.to(device))

    @property
    def labelled(self) -> tuple[tuple[int, int], ...]:
        """Positions [first, stop) that carry loss, for each sequence."""
        return tuple(
            (first - 1, length - 1) for first, length in zip(self.labelled_from, self.lengths, strict=True)
        )

    def positions(self) -> tuple[Tensor, Tensor]:
        """Return rows and columns (N,), (N,) of the N positions that carry loss, row by row.

        Position p of sequence b is labelled if labelled_from[b] - 1 <= p < lengths[b] - 1. The pair
        is an index of hidden states: `hidden[batch.positions()]` is (N, D).
        """
        column = torch.arange(self.tokens.shape[1], device=self.tokens.device)  # (T,)
        first = torch.tensor(self.labelled_from, device=column.device)[:, None] - 1  # (B, 1)
        last = torch.tensor(self.lengths, device=column.device)[:, None] - 1
        rows, columns = torch.nonzero((first <= column) & (column < last), as_tuple=True)
        return rows, columns

    def targets(self) -> Tensor:
        """Return the token ids (N,) that the labelled positions predict, in the order of `positions`."""
        return torch.cat(
            [row[first + 1 : stop + 1] for row, (first, stop) in zip(self.tokens, self.labelled, strict=True)]
        )

    def divided(self, parts: int) -> tuple[Batch, ...]:
        """Divide it into this many batches of about equal size, at most one for each sequence.

        A sequence keeps its tokens and its labels; a part is padded to its own longest sequence.
        """
        rows = len(self.lengths)
        if min(parts, rows) == 1:
            return (self,)
        batches = []
        for part in np.array_split(np.arange(rows), min(parts, rows)):
            rows_of_part = slice(int(part[0]), int(part[-1]) + 1)
            lengths = self.lengths[rows_of_part]
            tokens = self.tokens[rows_of_part, : max(lengths)]
            first = self.labelled_from[rows_of_part]
            batches.append(Batch(tokens, lengths, first, self.numbers[rows_of_part]))
        return tuple(batches)

    @property
    def labelled_tokens(self) -> int:
        """N, the number of positions that carry loss."""
        return sum(length - first for length, first in zip(self.lengths, self.labelled_from, strict=True))


@dataclass(frozen=True)
class BatchSize:
    """The size of one batch."""

    sequences: int
    """B."""
    longest: int
    """T, tokens of the longest sequence."""
    tokens: int
    """Real tokens."""
    labelled: int
    """Tokens that carry loss."""


class BatchStream:
    """An endless sequence of training batches, epoch after epoch, each example once an epoch."""

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        batch_tokens: int | None = None,
        seed: int = 0,
        client: int = 0,
    ) -> None:
        """Batch these examples by number (sizes differ by one at most) or, if given, by padded tokens."""
        if not examples:
            raise DataError(f"client {client} has no examples to train on; give more text or fewer clients")
        self._examples = tuple(examples)
        self._lengths = np.array([len(example) for example in examples])
        self._batch_size, self._batch_tokens = batch_size, batch_tokens
        self._seed, self._client = seed, client
        self._first_steps = [0]  # first step of each epoch that is known
        self._latest: tuple[int, list[Indices]] = (-1, [])  # the epoch of the last call, and its batches

    def batch(self, step: int) -> Batch:
        """Return the batch of this global step (from 0), the same at every call."""
        if step < 0:
            raise DataError(f"step {step}: steps are counted from 0")
        epoch, place = self._locate(step)
        numbers = self.epoch(epoch)[place].tolist()
        return Batch.of([self._examples[i] for i in numbers], numbers)

    def sizes(self) -> list[BatchSize]:
        """Return the sizes of the first epoch's batches, without building them."""
        sizes = []
        for indices in self.epoch(0):
            examples = [self._examples[i] for i in indices]
            lengths = [len(example) for example in examples]
            labelled = sum(len(example) - example.labelled_from for example in examples)
            sizes.append(BatchSize(len(examples), max(lengths), sum(lengths), labelled))
        return sizes

    def epoch(self, epoch: int) -> list[Indices]:
        """Return the batches of this epoch, as indices of the examples."""
        if self._latest[0] != epoch:
            self._latest = (epoch, self._plan(epoch))
        return self._latest[1]

    def _locate(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step, and the step's position in it."""
        if self._batch_tokens is None:  # every epoch has equally many batches
            return divmod(step, -(-len(self._examples) // self._batch_size))
        while self._first_steps[-1] <= step:
            self._first_steps.append(self._first_steps[-1] + len(self.epoch(len(self._first_steps) - 1)))
        epoch = int(np.searchsorted(self._first_steps, step, side="right")) - 1
        return epoch, step - self._first_steps[epoch]

    def _plan(self, epoch: int) -> list[Indices]:
        generator = Draw.BATCH.generator(self._seed, self._client, epoch)
        a_batch = self._batch_size
        if self._batch_tokens is not None:
            a_batch = max(1, int(self._batch_tokens / self._lengths.mean()))
        order = generator.permutation(len(self._examples))
        order = _sorted_in_windows(order, self._lengths, WINDOW_BATCHES * a_batch)
        batches = _cut(order, self._lengths, self._batch_size, self._batch_tokens)
        return [batches[i] for i in generator.permutation(len(batches))]


def eval_batches(
    examples: Sequence[Example],
    batch_size: int,
    batch_tokens: int | None = None,
) -> list[Batch]:
    """Batch examples, sorted by length; each once."""
    chosen = sorted(examples, key=len)
    if not chosen:
        raise DataError("there are no held-out examples to evaluate on; give more text or fewer clients")
    lengths = np.array([len(example) for example in chosen])
    parts = _cut(np.arange(len(chosen)), lengths, batch_size, batch_tokens)
    return [Batch.of([chosen[i] for i in part], part.tolist()) for part in parts]


def _sorted_in_windows(order: Indices, lengths: Indices, window: int) -> Indices:
    """Sort each window of the order by length, ascending and descending in turn.

    Alternating lets a batch that lies across two windows hold similar lengths too.
    """
    parts = []
    for number, start in enumerate(range(0, len(order), window)):
        part = order[start : start + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        parts.append(part[::-1] if number % 2 else part)
    return np.concatenate(parts)


def _cut(order: Indices, lengths: Indices, batch_size: int, batch_tokens: int | None) -> list[Indices]:
    """Cut an order into batches by number, or into batches of at most `batch_tokens` padded tokens.

    By number, the sizes differ by one at most instead of leaving a small last batch. By tokens, a
    sequence longer than the budget is a batch of its own.
    """
    if batch_tokens is None:
        return np.array_split(order, -(-len(order) // batch_size))
    starts, longest = [0], 0
    for place, length in enumerate(lengths[order].tolist()):
        longest = max(longest, length)
        if place > starts[-1] and longest * (place + 1 - starts[-1]) > batch_tokens:
            starts.append(place)
            longest = length
    return np.split(order, starts[1:])
