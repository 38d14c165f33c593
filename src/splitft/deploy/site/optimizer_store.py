"""Keep the moments of a site's optimizer, and a fingerprint of its text, on its disk between sessions.

    FOLDER/kept-0003.safetensors    moments in round 3, with their cut and count of steps; the last two rounds
    FOLDER/text.txt                 fingerprint of the text with which the site began the run

The site writes them after it has moved to a round's cut and after it has trained, before it tells the server:
what the server counts is on disk. The server may go back by one round, if it dies before its own checkpoint
or misses the site's message; therefore two rounds are kept. Moments are used only with the cut and the steps
that the server names. Without a match the optimizer starts afresh, as for a new site. Each file is sealed:
one that the disk has changed is not used, and the site's log says so. Files of earlier versions have no seal.

A text that has changed would move trained examples into the held-out part, so the site declines to go on with
another one. Its fingerprint never leaves the site: with it, the server could test guesses of the text.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from splitft.adapters import Moments
from splitft.errors import ForbiddenError
from splitft.files import write_whole
from splitft.seals import BLANK, is_whole, seal

ROUNDS_KEPT = 2
SEAL = "seal"
"""Key of the seal in the metadata of a file."""

logger = logging.getLogger(__name__)


class OptimizerStore:
    """One site's folder of moments for one run; without a folder, nothing is kept."""

    def __init__(self, folder: Path | None, text: str = "") -> None:
        """Use this folder; `text` is the fingerprint of the site's text, empty to compare none."""
        self._folder, self._text = folder, text

    def check_text(self, round: int) -> None:
        """Note the text when the run begins; raise ForbiddenError if it is another when the run goes on."""
        if self._folder is None or not self._text:
            return
        path = self._folder / "text.txt"
        if round == 0 or not path.is_file():
            write_whole(path, f"{self._text}\n")
        elif path.read_text(encoding="utf-8", errors="replace").strip() != self._text:
            raise ForbiddenError(
                "the text of this site is not the one with which it began this run: what is held out now may "
                "have been trained on. Restore the text (or the tokenizer), start another run, or remove "
                f"{path} to go on nevertheless"
            )

    def save(self, round: int, cut: int, steps: int, moments: Moments) -> None:
        """Write the client's moments of a round."""
        if self._folder is None or not moments:
            return
        contiguous = {name: tensor.contiguous() for name, tensor in moments.items()}
        data = save(contiguous, metadata={"steps": str(steps), "cut": str(cut), SEAL: BLANK})
        write_whole(self._folder / f"kept-{round:04d}.safetensors", seal(data))
        kept = sorted(self._folder.glob("kept-*.safetensors"), key=_round_of)
        past = [path for path in kept if _round_of(path) <= round]
        for old in {*kept} - {*past[-ROUNDS_KEPT:]}:  # later rounds were trained before the run began anew
            old.unlink(missing_ok=True)

    def load(self, round: int, cut: int, steps: int) -> Moments:
        """Return the last moments up to this round that are of this cut and count of steps, or none."""
        if self._folder is None:
            return {}
        for path in sorted(self._folder.glob("kept-*.safetensors"), reverse=True):
            if path.name > f"kept-{round:04d}.safetensors":
                continue
            try:
                kept_for, moments = _read(path)
            except (OSError, ValueError, LookupError, SafetensorError) as error:
                logger.warning(
                    "%s is damaged and is not used (%s); without moments of an earlier round that fit, the "
                    "optimizer starts afresh",
                    path,
                    error,
                )
                continue
            if kept_for == {"steps": str(steps), "cut": str(cut)}:
                return moments
        return {}


def _round_of(path: Path) -> int:
    """Return the round of a file; 0 for one that was named by somebody else."""
    number = path.stem.removeprefix("kept-")
    return int(number) if number.isdecimal() else 0


def _read(path: Path) -> tuple[dict[str, str], Moments]:
    """Return count of steps and cut, and the moments. Raises an error if the file has changed."""
    data = path.read_bytes()
    moments: Moments = load(data)
    length = int.from_bytes(data[:8], "little")
    kept_for: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    if kept_for.keys() != {"steps", "cut"}:  # of an earlier version, without a seal
        if kept_for.keys() != {"steps", "cut", SEAL} or not is_whole(data):
            raise ValueError("its content differs from its checksum")
        del kept_for[SEAL]
    return kept_for, moments
