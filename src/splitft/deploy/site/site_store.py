"""Keep on a site's disk what it needs from one session to the next: moments, and factors that never leave.

    FOLDER/kept-0003-begun.safetensors    as the site was when it had moved to the cut of round 3
    FOLDER/kept-0003.safetensors          as it was when it had trained round 3; the last two rounds are kept
    FOLDER/text.txt                       fingerprint of the text with which the site began the run

A file has the moments of the optimizer and the site's own factors (the B of `fedsa`, all of private blocks),
with their cut and count of steps. The site writes it before it tells the server: what the server counts is
on disk. The server may go back by one round, if it dies before its own checkpoint or misses the site's
message; therefore two rounds are kept, before and after training. What was kept is used only with the cut and
the steps that the server names. Without a match, as on a new disk, optimizer and factors start afresh. Each
file is sealed: one that the disk has changed is not used, and the site's log says so. Files of earlier
versions have no seal. Only the owner of the process may read them (0600).

A text that has changed would move trained examples into the held-out part, so the site declines to go on with
another one. Its fingerprint never leaves the site: with it, the server could test guesses of the text.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from splitft.adapters import AdapterState, Moments
from splitft.errors import AdapterError, ForbiddenError
from splitft.files import write_whole
from splitft.seals import BLANK, is_whole, seal

ROUNDS_KEPT = 2
SEAL = "seal"
"""Key of the seal in the metadata of a file."""
OWNER_ONLY = 0o600
_FACTOR = "own/"
"""Prefix of the site's own factors in a file."""
_BEGUN = "-begun"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptState:
    """State of a site after a round, kept on its disk."""

    moments: Moments = field(default_factory=dict)
    """Moments of its optimizer."""
    own: AdapterState = field(default_factory=AdapterState)
    """Factors that never leave it."""

    def __bool__(self) -> bool:
        return bool(self.moments or self.own)


class SiteStore:
    """One site's folder for one run; without a folder, nothing is kept."""

    def __init__(self, folder: Path | None, text: str = "") -> None:
        """Use this folder; `text` is the fingerprint of the site's text, empty to compare none."""
        self._folder, self._text = folder, text

    def check_text(self, round: int) -> None:
        """Note the text when the run begins; raise ForbiddenError if it is another when the run goes on."""
        if self._folder is None or not self._text:
            return
        path = self._folder / "text.txt"
        if round == 0 or not path.is_file():
            write_whole(path, f"{self._text}\n", OWNER_ONLY)
        elif path.read_text(encoding="utf-8", errors="replace").strip() != self._text:
            raise ForbiddenError(
                "the text of this site is not the one with which it began this run: what is held out now may "
                "have been trained on. Restore the text (or the tokenizer), start another run, or remove "
                f"{path} to go on nevertheless"
            )

    def save(self, round: int, cut: int, steps: int, state: KeptState, *, begun: bool = False) -> None:
        """Write the state of a round; `begun` if the site has moved to its cut and not trained yet."""
        if self._folder is None or not state:
            return
        own = {_FACTOR + name: tensor for name, tensor in state.own.tensors().items()}
        # copies: a factor that was not trained yet may be a part of a larger tensor
        tensors = {name: tensor.clone().contiguous() for name, tensor in {**state.moments, **own}.items()}
        data = save(tensors, metadata={"steps": str(steps), "cut": str(cut), SEAL: BLANK})
        stage = _BEGUN if begun else ""
        write_whole(self._folder / f"kept-{round:04d}{stage}.safetensors", seal(data), OWNER_ONLY)
        kept = list(self._folder.glob("kept-*.safetensors"))
        past = sorted({number for number in map(_round_of, kept) if number <= round})[-ROUNDS_KEPT:]
        for path in kept:
            # later rounds, and the training of this one, are of before the run began anew or went back
            again = begun and path.name == f"kept-{round:04d}.safetensors"
            if _round_of(path) not in past or again:
                path.unlink(missing_ok=True)

    def load(self, round: int, cut: int, steps: int) -> KeptState:
        """Return the last state up to this round that is of this cut and count of steps, or none."""
        if self._folder is None:
            return KeptState()
        for path in sorted(self._folder.glob("kept-*.safetensors"), key=_place_of, reverse=True):
            if _round_of(path) > round:
                continue
            try:
                kept_for, state = _read(path)
            except (OSError, ValueError, LookupError, SafetensorError, AdapterError) as error:
                logger.warning(
                    "%s is damaged and is not used (%s); without the state of an earlier round that fits, "
                    "the optimizer starts afresh, and so do factors of this site's own",
                    path,
                    error,
                )
                continue
            if kept_for == {"steps": str(steps), "cut": str(cut)}:
                return state
        return KeptState()


def _round_of(path: Path) -> int:
    """Return the round of a file; 0 for one that was named by somebody else."""
    number = path.stem.removeprefix("kept-").removesuffix(_BEGUN)
    return int(number) if number.isdecimal() else 0


def _place_of(path: Path) -> tuple[int, bool]:
    """Return the place of a file among those of a run: what was trained comes after what was begun."""
    return _round_of(path), not path.stem.endswith(_BEGUN)


def _read(path: Path) -> tuple[dict[str, str], KeptState]:
    """Return count of steps and cut, and the state. Raises an error if the file has changed."""
    data = path.read_bytes()
    tensors: dict[str, torch.Tensor] = load(data)
    length = int.from_bytes(data[:8], "little")
    kept_for: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    if kept_for.keys() != {"steps", "cut"}:  # of an earlier version, without a seal
        if kept_for.keys() != {"steps", "cut", SEAL} or not is_whole(data):
            raise ValueError("its content differs from its checksum")
        del kept_for[SEAL]
    own = {name.removeprefix(_FACTOR): tensor for name, tensor in tensors.items() if name.startswith(_FACTOR)}
    moments = {name: tensor for name, tensor in tensors.items() if not name.startswith(_FACTOR)}
    return kept_for, KeptState(moments, AdapterState.from_tensors(own))
