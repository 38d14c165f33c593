"""Where what can be made again is kept between runs: converted models, calibrations, counts."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where converted models and calibrations are kept: $SPLITFT_CACHE, else the user's cache folder."""
    given = os.environ.get("SPLITFT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(given) if given else Path(base) / "splitft"


def put(path: Path, text: str) -> None:
    """Write a file of the cache whole or not at all, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.draft")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
