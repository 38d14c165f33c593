"""Where what can be made again is kept between runs: converted models, calibrations, predictions."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where converted models and calibrations are kept: $SPLITFT_CACHE, else the user's cache folder."""
    given = os.environ.get("SPLITFT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(given) if given else Path(base) / "splitft"
