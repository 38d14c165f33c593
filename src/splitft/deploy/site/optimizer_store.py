"""Keep the moments of a site's optimizer on its own disk, from one session to the next.

    FOLDER/kept-0003.safetensors    moments in round 3, with their cut and count of steps; the last two rounds

The site writes them after it has moved to a round's cut and after it has trained, before it tells the server:
what the server counts is on disk. The server may go back by one round, if it dies before its own checkpoint
or misses the site's message; therefore two rounds are kept. Moments are used only with the cut and the steps
that the server names. Without a match the optimizer starts afresh, as for a new site.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from splitft.adapters import Moments
from splitft.files import write_whole

ROUNDS_KEPT = 2


class OptimizerStore:
    """One site's folder of moments for one run; without a folder, nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def save(self, round: int, cut: int, steps: int, moments: Moments) -> None:
        """Write the client's moments of a round."""
        if self._folder is None or not moments:
            return
        contiguous = {name: tensor.contiguous() for name, tensor in moments.items()}
        data = save(contiguous, metadata={"steps": str(steps), "cut": str(cut)})
        write_whole(self._folder / f"kept-{round:04d}.safetensors", data)
        for old in sorted(self._folder.glob("kept-*.safetensors"))[:-ROUNDS_KEPT]:
            old.unlink(missing_ok=True)

    def load(self, round: int, cut: int, steps: int) -> Moments:
        """Return the last moments up to this round that are of this cut and count of steps, or none."""
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
