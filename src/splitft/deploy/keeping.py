"""What a site keeps for itself between the links of a run: the moments of its optimizer, after each round.

    FOLDER/kept-0003.safetensors        moments after round 3; the two last rounds stay

The server may go back by one round, when it died between a site's last word and its own checkpoint; so two
rounds are kept. A file that is missing, damaged or of another number of steps means that moments start
afresh, as they do for a new site.
"""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from splitft.adapters import Moments

KEPT = 2
"""Rounds that stay on disk."""


class Keeping:
    """One site's folder for one run; without a folder, nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def keep(self, round: int, steps: int, moments: Moments) -> None:
        """Write what the client keeps after a round."""
        if self._folder is None or not moments:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        final = self._folder / f"kept-{round:04d}.safetensors"
        draft = final.with_suffix(".draft")
        contiguous = {name: tensor.contiguous() for name, tensor in moments.items()}
        draft.write_bytes(save(contiguous, metadata={"steps": str(steps)}))
        os.replace(draft, final)
        for old in sorted(self._folder.glob("kept-*.safetensors"))[:-KEPT]:
            old.unlink(missing_ok=True)

    def moments_of(self, round: int, steps: int) -> Moments:
        """The moments after this round, if they are here and of this many steps."""
        if self._folder is None:
            return {}
        try:
            with safe_open(self._folder / f"kept-{round:04d}.safetensors", framework="pt") as file:
                if (file.metadata() or {}).get("steps") != str(steps):
                    return {}
                names = list(file.keys())
                return {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError):
            return {}
