r"""Show a text that comes from outside, such that it cannot steer a terminal or forge a line of a log.

    "done\r\x1b[2J\u202e"  --printable-->  "done\\r\\x1b[2J\\u202e"

Control characters (C0, C1 and so every escape sequence), line breaks, bidirectional overrides and the other
characters without a look of their own become visible escapes, and the length is bounded. Letters of all
scripts stay as they are. Messages of other parties pass through here where they are read; whatever a terminal
or a log gets passes once more, since data have names too.
"""

from __future__ import annotations

import unicodedata
from typing import Any

LONGEST = 2000
"""Characters after which a text is cut off."""
_JOINERS = "\u200c\u200d"
"""Needed to write Persian and several Indian scripts."""


def printable(text: str, longest: int = LONGEST) -> str:
    """Return a text of at most `longest` characters, with escapes in place of those that steer."""
    start = text[: longest + 1]
    if not start.isprintable():
        start = "".join(map(_escaped, start))
    return start if len(start) <= longest else f"{start[: longest - 1]}…"


def printable_lines(text: str) -> str:
    """Return one of our own texts, whose line breaks are meant, with each line printable."""
    return "\n".join(printable(line, 10 * len(line)) for line in text.split("\n"))


def printable_data(value: Any) -> Any:
    """Return plain data with every text in it printable."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable_data(key): printable_data(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [printable_data(one) for one in value]
    return value


def _escaped(character: str) -> str:
    keeps = character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs"
    return character if keeps else character.encode("unicode_escape").decode("ascii")
