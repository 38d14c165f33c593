"""What a site keeps for itself over a run: the moments of its optimizer, since they were last other.

    FOLDER/kept-0003.safetensors        moments in round 3, at a cut and after so many steps; two rounds stay

They are written when the site has moved to a round's cut and when it has trained, before it says so: what the
server takes for moved or trained is on disk here. The server may go back by one round, when it died between
a site's last word and its own checkpoint, or when that word never came; so two rounds are kept. Moments are
those of the cut and the steps that the server counts; if there are none such, they start afresh, as they do
for a new site.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from splitft.adapters import Moments

KEPT = 2
"""Rounds that stay on disk."""


class OptimizerStore:
    """One site's folder for one run; without a folder, nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def keep(self, round: int, cut: int, steps: int, moments: Moments) -> None:
        """Write what the client keeps now, in a round."""
        if self._folder is None or not moments:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        final = self._folder / f"kept-{round:04d}.safetensors"
        draft = final.with_suffix(".draft")
        contiguous = {name: tensor.contiguous() for name, tensor in moments.items()}
        draft.write_bytes(save(contiguous, metadata={"steps": str(steps), "cut": str(cut)}))
        os.replace(draft, final)
        for old in sorted(self._folder.glob("kept-*.safetensors"))[:-KEPT]:
            old.unlink(missing_ok=True)

    def moments_of(self, round: int, cut: int, steps: int) -> Moments:
        """The last moments up to this round that are of this cut and of so many steps, if they are here."""
        if self._folder is None:
            return {}
        for path in sorted(self._folder.glob("kept-*.safetensors"), reverse=True):
            if path.name > f"kept-{round:04d}.safetensors":
                continue
            with contextlib.suppress(OSError, SafetensorError), safe_open(path, framework="pt") as file:
                if (file.metadata() or {}) == {"steps": str(steps), "cut": str(cut)}:
                    names = list(file.keys())
                    return {name: file.get_tensor(name) for name in names}
        return {}
