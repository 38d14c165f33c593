"""Divide examples among clients.

    length     K length classes by quantile, then for each class Dir(alpha) over clients (arXiv 2604.26388)
    label      the same with the values of a column as classes (Hsu et al. 2019, arXiv 1909.06335)
    quantity   Dir(alpha) over sizes alone; the kind of text does not differ between clients
    natural    one client for each value of a column, such as the site that owns the text
    iid        equal parts at random

Dir(alpha) with alpha = 0.1 gives nearly all of a class to one client; a large alpha gives equal parts.
Every example goes to exactly one client, and every client gets at least `minimum` examples: after the draw,
a client below the minimum receives examples, drawn at random, of the client that has most. A plug-in adds a
division with `PARTITIONS.add("mine", Partition(divide=function))`.
"""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import shorten

import numpy as np

from splitft.data.text import Example, Indices
from splitft.errors import DataError
from splitft.seeds import Draw
from splitft.specs import SharesSpec
from splitft.specs.data import PARTITIONS, Partition

__all__ = ["PARTITIONS", "Partition", "Shares", "divide", "values_of"]

Shares = tuple[tuple[int, ...], ...]
"""For each client the indices of its examples, ascending."""

LONGEST_NAME = 200
"""Most characters in a client's name, as in messages."""
MINIMUM = 2
"""Examples that a client needs: one to train on, one held out."""


def divide(
    examples: Sequence[Example], clients: int, spec: SharesSpec, seed: int = 0, minimum: int = MINIMUM
) -> Shares:
    """Divide the examples among the clients as `spec` says.

    Raises DataError, with the counts, if there are not `minimum` examples for every client, if the examples
    lack the labels that the division needs, or if the division does not give each example to one client.
    """
    if clients < 1:
        raise DataError(f"{clients} clients: text is divided among at least one")
    if clients * minimum > len(examples):
        raise DataError(
            f"{clients} clients need at least {minimum} examples each, {clients * minimum} in all, but "
            f"there are {len(examples)}; give more text"
            + (f", or at most {most} client(s)" if (most := len(examples) // minimum) else "")
        )
    generator = Draw.SHARE.generator(seed)
    partition = PARTITIONS.find(spec.by)
    parts = [np.asarray(part, np.int64) for part in partition.divide(examples, clients, spec, generator)]
    _check_complete(parts, clients, len(examples), spec.by)
    if partition.owns_text:
        _check_minimum(parts, minimum, examples, spec.by)
    else:
        parts = _fill_up(parts, minimum, generator)
    return tuple(tuple(sorted(part.tolist())) for part in parts)


def by_length(
    examples: Sequence[Example], clients: int, spec: SharesSpec, generator: np.random.Generator
) -> list[Indices]:
    """Draw from Dir(alpha) over clients within each of K length classes."""
    return _dirichlet(length_classes(examples, spec.classes), clients, spec.alpha, generator)


def iid(
    examples: Sequence[Example], clients: int, spec: SharesSpec, generator: np.random.Generator
) -> list[Indices]:
    """Divide at random into equal parts; sizes differ by one at most."""
    return np.array_split(generator.permutation(len(examples)), clients)


def by_label(
    examples: Sequence[Example], clients: int, spec: SharesSpec, generator: np.random.Generator
) -> list[Indices]:
    """Draw from Dir(alpha) over clients within each value of the column `spec.column`."""
    return _dirichlet(label_classes(examples), clients, spec.alpha, generator)


def by_quantity(
    examples: Sequence[Example], clients: int, spec: SharesSpec, generator: np.random.Generator
) -> list[Indices]:
    """Draw sizes from Dir(alpha), and the text at random: all examples are one class."""
    return _dirichlet(np.zeros(len(examples), dtype=np.int64), clients, spec.alpha, generator)


def natural(
    examples: Sequence[Example], clients: int, spec: SharesSpec, generator: np.random.Generator
) -> list[Indices]:
    """Give each value of the column `spec.column` to one client, in the order of `values_of`."""
    values = values_of(examples)
    if len(values) != clients:
        raise DataError(
            f"the column {spec.column!r} has {len(values)} values ({shorten(', '.join(values), 60)}), "
            f"but there are {clients} clients; by: natural needs clients.count: {len(values)}"
        )
    classes = label_classes(examples)
    return [np.flatnonzero(classes == one) for one in range(clients)]


def values_of(examples: Sequence[Example]) -> tuple[str, ...]:
    """Return the different labels of the examples, sorted; they name the clients that own the text."""
    values = {example.label for example in examples}
    if None in values:
        raise DataError(
            "the examples carry no labels to divide by; name their column in clients.shares.column"
        )
    return tuple(sorted(value for value in values if value is not None))


def owners_of(examples: Sequence[Example]) -> tuple[str, ...]:
    """Return the values of `values_of` as names of clients. Raises DataError for one that cannot be."""
    owners = values_of(examples)
    for name in owners:
        if len(name) > LONGEST_NAME:
            raise DataError(
                f"a client would be named after a value of {len(name)} characters ({name[:40]!r}...); give "
                f"values of at most {LONGEST_NAME} in clients.shares.column"
            )
        if name.startswith("=") or name == "server":
            raise DataError(
                f"no client can be named {name!r}: the run itself uses such names; write the value "
                "differently in clients.shares.column"
            )
    return owners


def label_classes(examples: Sequence[Example]) -> Indices:
    """Return the index (n,) of each example's label in `values_of`."""
    index = {value: number for number, value in enumerate(values_of(examples))}
    return np.array([index[example.label] for example in examples if example.label is not None])


def length_classes(examples: Sequence[Example], classes: int) -> Indices:
    """Return the class (n,), from 0 for the shortest, of each example by quantiles of token length.

    Equal lengths are in one class, so a corpus of few different lengths has fewer than `classes`.
    """
    lengths = np.array([len(example) for example in examples])
    inner = np.quantile(lengths, np.linspace(0, 1, classes + 1)[1:-1])
    return np.searchsorted(inner, lengths, side="left")


def _dirichlet(classes: Indices, clients: int, alpha: float, generator: np.random.Generator) -> list[Indices]:
    """For each class, in order, divide its shuffled members by proportions drawn from Dir(alpha)."""
    parts: list[list[Indices]] = [[] for _ in range(clients)]
    for one in np.unique(classes):
        members = generator.permutation(np.flatnonzero(classes == one))
        proportions = generator.dirichlet(np.full(clients, alpha))
        ends = np.round(np.cumsum(proportions) * len(members)).astype(np.int64)[:-1]
        for part, piece in zip(parts, np.split(members, ends), strict=True):
            part.append(piece)
    return [np.concatenate(part) for part in parts]


def _fill_up(parts: list[Indices], minimum: int, generator: np.random.Generator) -> list[Indices]:
    """Move examples, drawn at random, from the largest part to each that has fewer than `minimum`."""
    parts = list(parts)
    for small in range(len(parts)):
        while len(parts[small]) < minimum:
            largest = max(range(len(parts)), key=lambda client: len(parts[client]))
            drawn = int(generator.integers(len(parts[largest])))
            parts[small] = np.append(parts[small], parts[largest][drawn])
            parts[largest] = np.delete(parts[largest], drawn)
    return parts


def _check_complete(parts: Sequence[Indices], clients: int, examples: int, by: str) -> None:
    """Raise DataError unless there is a part for each client and each example is in exactly one."""
    if len(parts) != clients:
        raise DataError(f"the partition {by!r} gives {len(parts)} shares for {clients} clients")
    if not np.array_equal(np.sort(np.concatenate(parts)), np.arange(examples)):
        raise DataError(
            f"the partition {by!r} must give each of {examples} examples to exactly one client, by its index "
            f"from 0; it gives {sum(map(len, parts))}"
        )


def _check_minimum(parts: Sequence[Indices], minimum: int, examples: Sequence[Example], by: str) -> None:
    """Raise DataError if the owner of a text has fewer than `minimum` examples."""
    small = [
        f"{name!r} {len(part)}"
        for name, part in zip(values_of(examples), parts, strict=True)
        if len(part) < minimum
    ]
    if small:
        raise DataError(
            f"with by: {by} every client needs at least {minimum} examples, but these have fewer: "
            f"{shorten(', '.join(small), 200)}; give them more text, or leave them out"
        )
