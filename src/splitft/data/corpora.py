"""Read a corpus by name: the embedded text, a local file, a data set of the Hugging Face hub, or a plug-in's.

    python-docs                     the Python language reference, a part of CPython; column `topic`
    *.txt                           paragraphs between blank lines; without blank lines, lines
    *.jsonl  *.csv  *.tsv  *.parquet   rows with named columns
    owner/name, name                a hub data set, through `datasets`
    NAME, NAME:anything             a source of a plug-in: `SOURCES.add("NAME", function)`

Each row becomes a record: a text, or a prompt and its completion, with the value of one more column if shares
are divided by it. Local files are read in place; nothing is copied into a cache. A blank text stays a
record, so that `tokenise` can count it.
"""

from __future__ import annotations

import csv
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from splitft.errors import DataError
from splitft.seeds import Draw
from splitft.specs import DataSpec
from splitft.specs.data import SOURCES

SHORTEST_PARAGRAPH = 20
"""Characters under which a paragraph of the embedded text is skipped: headings, `See also:`."""

LONGEST_FIELD = 2**31 - 1
"""Characters of one csv field; the csv library's own limit, 131,072, is shorter than a long document."""

BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")
UNDERLINE = re.compile(r"^\s*([*=\-~^\"])\1{3,}\s*$", re.MULTILINE)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

Row = tuple[str, Mapping[str, object]]
"""The place of a row in the user's words (`line 7`), and its values by column."""


@dataclass(frozen=True)
class Record:
    """One row of a corpus."""

    text: str
    """The text that carries the loss: the whole text, or the completion."""
    prompt: str | None = None
    """The text before a completion, without loss; None for plain text."""
    label: str | None = None
    """Value of the column that shares are divided by, if one was given."""


def read_records(spec: DataSpec, column: str | None = None, seed: int = 0) -> tuple[Record, ...]:
    """Read the records of `spec.source`, each with its value of `column` as label, in the source's order.

    With `spec.max_examples`, that many are drawn by the seed. Raises DataError if the source cannot be
    found or read, lacks a column, holds something that is not text, or is empty.
    """
    columns = (
        [spec.text] if spec.prompt is None or spec.completion is None else [spec.completion, spec.prompt]
    )
    wanted = columns if column is None else [*columns, column]
    try:
        records = tuple(
            Record(
                text=_text(row, columns[0], place, spec.source),
                prompt=_text(row, columns[1], place, spec.source) if len(columns) > 1 else None,
                label=None if column is None else _label(row, column, place, spec.source),
            )
            for place, row in _rows(spec, wanted)
        )
    except UnicodeDecodeError as error:
        raise DataError(f"{spec.source} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise DataError(f"{spec.source} cannot be read: {error.strerror or error}") from error
    if not any(record.text.strip() for record in records):
        what = f"only blank text ({len(records)} rows)" if records else "no text"
        raise DataError(f"{spec.source} holds {what}; check data.source and the column {columns[0]!r}")
    if spec.max_examples is not None and spec.max_examples < len(records):
        generator = Draw.SAMPLE.generator(seed)
        drawn = np.sort(generator.choice(len(records), spec.max_examples, replace=False))
        records = tuple(records[i] for i in drawn)
    return records


def _rows(spec: DataSpec, wanted: Sequence[str]) -> Iterable[Row]:
    """Return the rows of a source, each with at least the wanted columns."""
    if spec.source_name is not None:
        return _named(spec, spec.source_name, wanted)
    path = Path(spec.source).expanduser()
    reader = READERS.get(path.suffix.lower())
    if path.is_file() and reader is not None:
        return reader(path, wanted)
    if reader is None and not path.exists() and HUB_ID.fullmatch(spec.source):
        if hint := _nearest(spec.source, list(SOURCES)):
            raise DataError(f"there is no text named {spec.source!r}{hint}")
        return _hub(spec, wanted)
    siblings = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
    readable = sorted(name for name in siblings if Path(name).suffix.lower() in READERS)
    if path.is_dir():
        raise DataError(f"{path} is a folder; give one file in it ({', '.join(READERS)})")
    if path.exists():
        raise DataError(f"{path} has the suffix {path.suffix!r}; files may be {', '.join(READERS)}")
    raise DataError(f"there is no file {path}{_nearest(path.name, readable)}")


def _named(spec: DataSpec, name: str, wanted: Sequence[str]) -> Iterator[Row]:
    """Read a source of the registry. Raises DataError for rows that are no mapping or lack a column."""
    for number, row in enumerate(SOURCES[name](spec, wanted), start=1):
        place = f"row {number}"
        if not isinstance(row, Mapping):
            raise DataError(
                f"{spec.source}: {place} is a {type(row).__name__}; the data source {name!r} must give "
                "mappings, values by column"
            )
        _require(wanted, list(row), f"{spec.source}: {place}")
        yield place, row


def python_docs(spec: DataSpec, wanted: Sequence[str]) -> Iterator[Mapping[str, object]]:
    """Read the paragraphs of the language reference, by topic in alphabetical order, without the headings.

    Topics share text. A shared paragraph is read once, under the first topic: otherwise a fifth of the
    held-out text would have been trained on.
    """
    from pydoc_data.topics import topics

    if spec.source_argument:
        raise DataError(f"data.source: python-docs takes nothing after a colon; found {spec.source!r}")
    _require(wanted, ["text", "topic"], "python-docs")
    seen = set()
    for topic in sorted(topics):
        for paragraph in BLANK_LINES.split(topics[topic]):
            text = textwrap.dedent(paragraph).strip()
            words = " ".join(text.split())
            if len(text) >= SHORTEST_PARAGRAPH and not UNDERLINE.search(text) and words not in seen:
                seen.add(words)
                yield {"text": text, "topic": topic}


def _plain_text(path: Path, wanted: Sequence[str]) -> Iterator[Row]:
    _require(wanted, ["text"], str(path))
    text = path.read_text(encoding="utf-8-sig").strip()
    parts = BLANK_LINES.split(text) if BLANK_LINES.search(text) else text.splitlines()
    for number, part in enumerate(parts, start=1):
        if part.strip():
            yield f"paragraph {number}", {"text": part.strip()}


def _json_lines(path: Path, wanted: Sequence[str]) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"{path}: line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}: line {number} is a JSON {type(row).__name__}; each line must be an object, "
                    f'such as {{"{wanted[0]}": "..."}}'
                )
            _require(wanted, list(row), f"{path}: line {number}")
            yield f"line {number}", row


def _separated(path: Path, wanted: Sequence[str]) -> Iterator[Row]:
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            header = next(rows, [])
            if header:
                _require(wanted, header, str(path))
            for row in rows:
                if row and len(row) != len(header):
                    raise DataError(
                        f"{path}: line {rows.line_num} has {len(row)} fields, but the header names "
                        f"{len(header)}; quote text that holds the separator or a line break"
                    )
                if row:
                    yield f"line {rows.line_num}", dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}: line {rows.line_num} is not csv: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path, wanted: Sequence[str]) -> Iterator[Row]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as table:
            _require(wanted, table.schema_arrow.names, str(path))
            number = 0
            for batch in table.iter_batches(columns=list(dict.fromkeys(wanted))):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from error


def _hub(spec: DataSpec, wanted: Sequence[str]) -> Iterator[Row]:
    import datasets

    try:
        table = datasets.load_dataset(spec.source, spec.hub_config, split=spec.hub_split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{spec.source!r} is neither a named source ({', '.join(SOURCES)}) nor a file, and as a hub data "
            f"set (split {spec.hub_split!r}) it cannot be loaded: {error}"
        ) from error
    _require(wanted, table.column_names, spec.source)
    for number, row in enumerate(table.select_columns(list(dict.fromkeys(wanted))), start=1):
        yield f"row {number}", row


def _require(wanted: Sequence[str], found: Sequence[str], where: str) -> None:
    for column in wanted:
        if found.count(column) > 1:
            raise DataError(f"{where} has {found.count(column)} columns named {column!r}; rename all but one")
        if column not in found:
            raise DataError(
                f"{where} has no column {column!r}; it has {', '.join(map(repr, found)) or 'none'}"
                f"{_nearest(column, found)}"
            )


def _nearest(name: str, names: Sequence[str]) -> str:
    near = get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _text(row: Mapping[str, object], column: str, place: str, source: str) -> str:
    """Return the text of a column; a missing value counts as blank."""
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{source}: {place} holds a {type(value).__name__} in the column {column!r} ({value!r:.40}); "
            f"the column must hold text"
        )
    return _valid(value, column, place, source)


def _label(row: Mapping[str, object], column: str, place: str, source: str) -> str:
    """Return the value of a column that shares are divided by, as text."""
    value = row[column]
    if isinstance(value, (str, int, float)) and value != "":
        return _valid(str(value), column, place, source)
    raise DataError(
        f"{source}: {place} has {value!r:.40} in the column {column!r}; to divide by this column, every row "
        f"needs a name or a number in it"
    )


def _valid(text: str, column: str, place: str, source: str) -> str:
    """Return a text. Raises DataError for half a character (a lone surrogate), which no file can hold."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{source}: {place}, column {column!r}, is not valid text: {error.reason}"
            ) from error
    return text


READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[Row]]] = {
    ".txt": _plain_text,
    ".jsonl": _json_lines,
    ".csv": _separated,
    ".tsv": _separated,
    ".parquet": _parquet,
}
"""Readers of local files, by suffix."""
