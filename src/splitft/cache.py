"""Keep what can be computed again in the user's cache folder: converted models, calibrations, counts.

    facts --SHA-256--> FOLDER/HASH.json --load--> value, or else make() --dump--> FOLDER/HASH.json

The facts are everything that a value depends on.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from splitft.files import write_whole

T = TypeVar("T")


def cache_folder() -> Path:
    """Return $SPLITFT_CACHE, or else `splitft` in the user's cache folder."""
    given = os.environ.get("SPLITFT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(given) if given else Path(base) / "splitft"


@dataclass(frozen=True)
class KeyedCache(Generic[T]):
    """Values of one kind, each in a file named by the hash of everything that it depends on."""

    folder: Path
    dump: Callable[[T], bytes]
    load: Callable[[bytes], T]
    """The inverse of `dump`; raises any error for bytes that it cannot read."""
    suffix: str = ".json"

    def cached(self, facts: object, make: Callable[[], T]) -> T:
        """Return the value for these facts: from its file, or made now and kept."""
        found = self.find(facts)
        if found is None:
            found = make()
            self.put(facts, found)
        return found

    def find(self, facts: object) -> T | None:
        """Return the value for these facts, or None if there is none that can be read."""
        try:
            return self.load(self._path(facts).read_bytes())
        except Exception:  # not there, damaged, or of another version
            return None

    def put(self, facts: object, value: T) -> None:
        """Keep a value."""
        write_whole(self._path(facts), self.dump(value))

    def _path(self, facts: object) -> Path:
        data = facts if isinstance(facts, bytes) else repr(facts).encode()
        return self.folder / f"{hashlib.sha256(data).hexdigest()[:24]}{self.suffix}"


def file_digest(path: Path) -> str | None:
    """Return the SHA-256 of a file's content, or None if there is no such file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
