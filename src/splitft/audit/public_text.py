"""Load public text for an attacker to learn on, never the text that is attacked.

    a file that the user names (WikiText, say)  |  the language reference  |  docstrings of Python's library

The last is for audits of the language reference itself. No text is downloaded.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from splitft.data.corpora import Record, read_records
from splitft.data.tokens import tokenise
from splitft.errors import DataError
from splitft.model import Model
from splitft.specs import DataSpec

LENGTH = 64
"""Tokens of each public text."""
SHORTEST_DOCSTRING = 120
"""Characters."""


def public_tokens(model: Model, source: str | None, audited: str, count: int) -> tuple[torch.Tensor, str]:
    """Return public tokens (B, T), about `count` in all, and the name of their source.

    Raises DataError if the source is the audited text itself, or too short to learn on.
    """
    if source is not None and source == audited:
        raise DataError(f"--public {source} is the audited text: give the attacker another one")
    if source is not None:
        records, name = read_records(DataSpec(source=source)), Path(source).name
    elif audited != "python-docs":
        records, name = read_records(DataSpec(source="python-docs")), "python-docs"
    else:
        records, name = tuple(_docstrings(8 * count)), "docstrings of Python's library"
    length = min(LENGTH, model.shape.max_positions)
    texts = tokenise(records, model.tokenizer(), 1024).examples
    stream = [token for text in texts for token in text.tokens][:count]
    if len(stream) < 4 * length:
        raise DataError(
            f"{name} has {len(stream)} tokens, too few for an attacker to learn on; give --public"
        )
    return torch.tensor(stream[: len(stream) // length * length]).view(-1, length), name


def _docstrings(characters: int) -> Iterator[Record]:
    """Yield about so many characters of documentation from the running Python's library."""
    for path in sorted(Path(ast.__file__).parent.glob("[a-z]*.py")):
        if characters <= 0:
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) >= SHORTEST_DOCSTRING:
                    characters -= len(text)
                    yield Record(text)
