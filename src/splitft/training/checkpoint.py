"""Checkpoints: all that a run needs to continue after any stop, written atomically after each round.

    checkpoints/round-0002/  state.json           round, cuts, steps of each client, checksums
                             state.safetensors    global/..., folded/..., optimizer/..., client/NAME/...,
                                                  server/SLOT/..., private/NAME/..., own/NAME/...,
                                                  memory/NAME/END/STREAM/... of codecs that learn

A checkpoint is written to a draft folder, flushed to the disk and renamed, so that a folder of its name is
always complete; older ones are removed only then. A full disk or a kill -9 loses only the draft. Batches,
participants and new factors are functions of seed and round, so no generator's state is stored.

`state.json` holds the SHA-256 of the tensors' file and its own seal, so a checkpoint that a disk has changed
is found when it is read; the one before it is used then. Format 1 is the same without checksums.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from splitft.adapters import AdapterState, Moments
from splitft.errors import AdapterError, DamagedError, RunError
from splitft.files import whole_folder
from splitft.seals import BLANK, is_whole, seal
from splitft.training.rounds import RunState

FORMAT = 2
READ = (1, FORMAT)
"""Formats that can be read."""
KEPT = 2
"""Checkpoints that are kept on disk."""
FACTS, TENSORS = "state.json", "state.safetensors"
"""Files of a checkpoint."""
_KEYS = {"format", "round", "cuts", "steps", "losses"}
"""Keys of `state.json`, without those of the checksums."""


@dataclass(frozen=True)
class Snapshot:
    """State of a run between two rounds, with that of each party."""

    state: RunState
    steps: dict[str, int]
    """Optimizer steps taken by each client."""
    client_moments: dict[str, Moments]
    """Optimizer moments by client, when kept."""
    server_moments: dict[str, Moments]
    """The server's, by slot."""
    private: dict[str, AdapterState] = field(default_factory=dict)
    """Factors that clients never upload, by client."""
    memories: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """State of codecs that learn, by client and end of its channel."""
    own: dict[str, AdapterState] = field(default_factory=dict)
    """Personal factors B by client, over all L blocks; none by most rules."""
    passed_over: tuple[str, ...] = ()
    """Later checkpoints that could not be read, one sentence each; not saved."""


def folder_of(run: Path, number: int) -> Path:
    """Return the folder of a round's checkpoint."""
    return run / "checkpoints" / f"round-{number:04d}"


def save_snapshot(run: Path, snapshot: Snapshot) -> Path:
    """Write the checkpoint of the round just finished; return its folder.

    Raises RunError if it cannot be written; earlier checkpoints are then still there.
    """
    number = snapshot.state.round
    final = folder_of(run, number)
    facts = {
        "format": FORMAT,
        "round": number,
        "cuts": dict(snapshot.state.cuts),
        "steps": snapshot.steps,
        "losses": dict(snapshot.state.losses),
        "update_sizes": list(snapshot.state.update_sizes),
        "undone": snapshot.state.undone,
    }
    try:
        with whole_folder(final) as draft:
            tensors = save(_tensors(snapshot))
            sealed = {**facts, "files": {TENSORS: hashlib.sha256(tensors).hexdigest()}, "seal": BLANK}
            _save(tensors, draft / TENSORS)
            _save(seal((json.dumps(sealed, indent=2) + "\n").encode()), draft / FACTS)
            for file in (*draft.iterdir(), draft):
                _flush(file)
        _flush(final.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(
            f"the checkpoint of round {number} could not be written to {final.parent} ({reason}); "
            f"{what_is_safe(run)}"
        ) from error
    for old in _numbers(run)[:-KEPT]:
        shutil.rmtree(folder_of(run, old), ignore_errors=True)
    return final


def what_is_safe(run: Path) -> str:
    """Return a sentence for an error message: the last checkpoint, and how to continue from it."""
    number = latest(run)
    safe = f"round {number} is safe in {folder_of(run, number)}" if number else "no round is saved yet"
    return f"{safe}. Free some space, then continue with --resume"


def latest(run: Path) -> int | None:
    """Return the last round with a checkpoint, None without one."""
    numbers = _numbers(run)
    return numbers[-1] if numbers else None


def load_latest(run: Path) -> Snapshot | None:
    """Read the last checkpoint that is whole; None if there is none at all.

    The snapshot names those that were passed over. Raises RunError if every checkpoint is damaged, or if the
    last one was written by a later version.
    """
    damaged: list[str] = []
    for number in reversed(_numbers(run)):
        try:
            snapshot = load_snapshot(run, number)
        except DamagedError as error:
            damaged.append(str(error))
            continue
        said = tuple(f"{one}; the run goes on from round {number} instead" for one in damaged)
        return replace(snapshot, passed_over=said)
    if damaged:
        raise RunError(f"{'; '.join(damaged)}; no checkpoint is left: start again with another --out")
    return None


def set_aside_after(run: Path, number: int) -> None:
    """Rename the checkpoints of later rounds, which could not be read, to `round-N.damaged`."""
    for later in (other for other in _numbers(run) if other > number):
        folder = folder_of(run, later)
        kept = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(kept, ignore_errors=True)
        os.replace(folder, kept)


def load_snapshot(run: Path, number: int) -> Snapshot:
    """Read a checkpoint. Raises DamagedError if it is not as it was written, RunError for another format."""
    folder = folder_of(run, number)
    try:
        facts, tensors = _read(folder)
        if facts["round"] != number:
            raise ValueError(f"it holds round {facts['round']}")
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in load(tensors).items():
            owner, _, rest = name.partition("/")
            parts.setdefault(owner, {})[rest] = tensor
        adapters = AdapterState.from_tensors(parts["global"])
        folded = AdapterState.from_tensors(parts.get("folded", {}))
        state = RunState(
            facts["round"], facts["cuts"], adapters, facts["losses"], folded, parts.get("optimizer", {}),
            tuple(facts.get("update_sizes", ())), facts.get("undone", 0),
        )  # fmt: skip
        owned = {side: _by_owner(parts.get(side, {})) for side in ("client", "server", "private", "own")}
        private, own = (
            {name: AdapterState.from_tensors(tensors) for name, tensors in owned[side].items()}
            for side in ("private", "own")
        )
        memories = _by_end(parts.get("memory", {}))
        return Snapshot(state, facts["steps"], owned["client"], owned["server"], private, memories, own)
    except (OSError, ValueError, LookupError, TypeError, SafetensorError, AdapterError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DamagedError(f"{folder} is damaged and cannot be used ({reason})") from error


def _read(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Return the facts and the tensors' file, compared with the checksums unless they are of format 1."""
    text, tensors = (folder / FACTS).read_bytes(), (folder / TENSORS).read_bytes()
    try:
        facts: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{FACTS} is not what was written") from error
    if facts["format"] == 1 and facts.keys() == _KEYS:
        return facts, tensors
    whole = is_whole(text)
    if facts["format"] not in READ and (whole or "seal" not in facts):
        known = " and ".join(map(str, READ))
        raise RunError(f"{folder} has format {facts['format']}, this version reads {known}")
    if not whole:
        raise ValueError(f"{FACTS} is not what was written")
    if hashlib.sha256(tensors).hexdigest() != facts["files"][TENSORS]:
        raise ValueError(f"{TENSORS} is not what was written")
    return facts, tensors


def _tensors(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    flat = {f"global/{name}": tensor for name, tensor in snapshot.state.adapters.tensors().items()}
    flat |= {f"optimizer/{name}": tensor for name, tensor in snapshot.state.memory.items()}
    flat |= {f"folded/{name}": tensor for name, tensor in snapshot.state.folded.tensors().items()}
    private = {name: state.tensors() for name, state in snapshot.private.items()}
    own = {  # copies: a factor that a client has not trained yet is the global tensor itself
        name: {key: tensor.clone() for key, tensor in state.tensors().items()}
        for name, state in snapshot.own.items()
    }
    by_side = {
        "client": snapshot.client_moments, "server": snapshot.server_moments, "private": private, "own": own,
    }  # fmt: skip
    for side, owners in by_side.items():
        for owner, moments in owners.items():
            flat.update((f"{side}/{owner}/{name}", tensor) for name, tensor in moments.items())
    for end, tensors in snapshot.memories.items():
        flat.update((f"memory/{end}/{name}", tensor) for name, tensor in tensors.items())
    return {name: tensor.contiguous() for name, tensor in flat.items()}


def _by_owner(tensors: dict[str, torch.Tensor]) -> dict[str, Moments]:
    """Group tensors `owner/name` by owner."""
    owners: dict[str, Moments] = {}
    for name, tensor in tensors.items():
        owner, _, rest = name.rpartition("/")
        owners.setdefault(owner, {})[rest] = tensor
    return owners


def _by_end(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Group tensors `client/end/stream/name` by client and end; the name of a client may contain `/`."""
    ends: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        end, stream, rest = name.rsplit("/", 2)
        ends.setdefault(end, {})[f"{stream}/{rest}"] = tensor
    return ends


def _numbers(run: Path) -> list[int]:
    folders = [folder for folder in (run / "checkpoints").glob("round-*") if folder.is_dir()]
    numbers = [folder.name.removeprefix("round-") for folder in folders]
    return sorted(int(number) for number in numbers if number.isdecimal())


def _save(data: bytes, path: Path) -> None:
    """Write one file of a checkpoint."""
    path.write_bytes(data)


def _flush(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
