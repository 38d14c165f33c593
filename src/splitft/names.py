"""One rule for the names that become files and folders, and a file-safe form for all others.

    north-clinic      fits the rule: it is its own file name
    Klinik Süd/3      --file_safe-->  klinik-sud-3~1f0c9a2744        a readable part, and a hash of the name
    ../../escaped     --file_safe-->  escaped~8d21b3f00a

A name from a configuration, a job or another party either fits the rule (`is_file_safe`) or is refused. Data
have names of their own, such as the values of a column; what people read is those, and what becomes a path is
their file-safe form. Different names never share a file, not even where upper and lower case are the same.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

NAME_PATTERN = r"^[A-Za-z0-9]([A-Za-z0-9_-]{0,62}[A-Za-z0-9])?$"
"""The rule: 1 to 64 letters, digits, hyphens and underscores, with a letter or digit at both ends."""
NAME_RULE = "1 to 64 letters, digits, - and _, with a letter or digit at both ends"
"""The rule in words, for messages."""
DEVICES = frozenset(
    ["con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))]
)
"""Names that are devices on Windows, in any folder."""
SLUG_LENGTH, HASH_LENGTH = 40, 10
"""Letters of the readable part, and of the hash; a longer one only where two would be equal."""

_PLAIN = re.compile(NAME_PATTERN.strip("^$"))
_MADE = re.compile(rf"[a-z0-9]([a-z0-9-]{{0,{SLUG_LENGTH - 2}}}[a-z0-9])?~[0-9a-f]{{{HASH_LENGTH},64}}")


def is_plain(name: object) -> bool:
    """Return whether a name fits the rule."""
    return isinstance(name, str) and bool(_PLAIN.fullmatch(name)) and name.casefold() not in DEVICES


def is_file_safe(name: object) -> bool:
    """Return whether a name fits the rule, or is a form that `file_safe` has made."""
    return is_plain(name) or (isinstance(name, str) and bool(_MADE.fullmatch(name)))


def file_safe(names: Iterable[str]) -> dict[str, str]:
    """Return a file name for each of these names; no two are equal, upper and lower case apart.

    A name that fits the rule keeps itself, unless another differs from it in case alone.
    """
    distinct = sorted(set(names))
    alike = Counter(name.casefold() for name in distinct if is_plain(name))
    others = [name for name in distinct if not is_plain(name) or alike[name.casefold()] > 1]
    length = HASH_LENGTH
    while len({_form(name, length) for name in others}) < len(others):
        length += 1
    return {name: _form(name, length) if name in set(others) else name for name in distinct}


def file_safe_name(name: str) -> str:
    """Return the file name of one name."""
    return file_safe([name])[name]


def _form(name: str, length: int) -> str:
    """Return a readable part of a name and this many digits of its hash."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:SLUG_LENGTH].strip("-")
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{slug or 'name'}~{digest[:length]}"
