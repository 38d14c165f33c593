"""What a run needs to continue after any stop, written in one stroke after each round.

    checkpoints/round-0002/  state.json           round, cuts, steps of each client
                             state.safetensors    global/..., folded/..., optimizer/..., client/NAME/...,
                                                  server/SLOT/..., private/NAME/..., own/NAME/...,
                                                  memory/NAME/END/STREAM/... of codecs that learn

A checkpoint is written beside, flushed to the disk and renamed, so that a folder of that name is always
whole; the one before is removed only then. A full disk or a kill -9 in the middle loses the draft alone.
Batches, participants and fresh factors are pure functions of seed and round: no generator's state is kept.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from splitft.adapters import AdapterState, Moments
from splitft.errors import AdapterError, RunError
from splitft.training.rounds import RunState

FORMAT = 1
KEPT = 2
"""Checkpoints that stay on disk."""


@dataclass(frozen=True)
class Snapshot:
    """A run between two rounds, with what each party keeps for itself."""

    state: RunState
    steps: dict[str, int]
    """Optimizer steps taken by each client."""
    client_moments: dict[str, Moments]
    """Optimizer moments by client, when kept."""
    server_moments: dict[str, Moments]
    """The server's, by slot."""
    private: dict[str, AdapterState] = field(default_factory=dict)
    """Factors by client that it never uploads."""
    memories: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """What codecs remember, by client and end of its line."""
    own: dict[str, AdapterState] = field(default_factory=dict)
    """Factors that are a client's own, by client and over all L blocks, by rules that leave some with it."""


def folder_of(run: Path, number: int) -> Path:
    """Where the checkpoint of a round is."""
    return run / "checkpoints" / f"round-{number:04d}"


def save_snapshot(run: Path, snapshot: Snapshot) -> Path:
    """Write the checkpoint of the round just finished; returns its folder.

    Raises RunError if it cannot be written; the checkpoint before it is then still there.
    """
    number = snapshot.state.round
    final = folder_of(run, number)
    draft = final.with_name(f".{final.name}.draft")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        _save(_tensors(snapshot), draft / "state.safetensors")
        facts = {
            "format": FORMAT,
            "round": number,
            "cuts": dict(snapshot.state.cuts),
            "steps": snapshot.steps,
            "losses": dict(snapshot.state.losses),
        }
        (draft / "state.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        for file in (*draft.iterdir(), draft):
            _flush(file)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(draft, final)
        _flush(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise RunError(
            f"the checkpoint of round {number} could not be written to {final.parent} ({reason}); "
            f"{what_is_safe(run)}"
        ) from error
    for old in _numbers(run)[:-KEPT]:
        shutil.rmtree(folder_of(run, old), ignore_errors=True)
    return final


def what_is_safe(run: Path) -> str:
    """For whoever's disk gave out: where the last whole round is, and how to go on."""
    number = latest(run)
    safe = f"round {number} is safe in {folder_of(run, number)}" if number else "no round is saved yet"
    return f"{safe}. Free some space, then continue with --resume"


def latest(run: Path) -> int | None:
    """The last round with a checkpoint, if there is one."""
    numbers = _numbers(run)
    return numbers[-1] if numbers else None


def load_snapshot(run: Path, number: int) -> Snapshot:
    """Read a checkpoint. Raises RunError if it is damaged or of another version."""
    folder = folder_of(run, number)
    try:
        facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise RunError(f"{folder} has format {facts['format']}, this version reads {FORMAT}")
        tensors = load_file(folder / "state.safetensors")
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            owner, _, rest = name.partition("/")
            parts.setdefault(owner, {})[rest] = tensor
        adapters = AdapterState.from_tensors(parts["global"])
        folded = AdapterState.from_tensors(parts.get("folded", {}))
        state = RunState(
            facts["round"], facts["cuts"], adapters, facts["losses"], folded, parts.get("optimizer", {})
        )
        owned = {side: _by_owner(parts.get(side, {})) for side in ("client", "server", "private", "own")}
        private, own = (
            {name: AdapterState.from_tensors(tensors) for name, tensors in owned[side].items()}
            for side in ("private", "own")
        )
        memories = _by_line(parts.get("memory", {}))
        return Snapshot(state, facts["steps"], owned["client"], owned["server"], private, memories, own)
    except (OSError, ValueError, LookupError, TypeError, SafetensorError, AdapterError) as error:
        raise RunError(f"{folder} is damaged and cannot be read ({error}){_instead(run, number)}") from error


def _instead(run: Path, number: int) -> str:
    """What to do without this checkpoint."""
    older = [other for other in _numbers(run) if other < number]
    return f"; remove it to continue from round {older[-1]}" if older else "; start again with another --out"


def _tensors(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    flat = {f"global/{name}": tensor for name, tensor in snapshot.state.adapters.tensors().items()}
    flat |= {f"optimizer/{name}": tensor for name, tensor in snapshot.state.memory.items()}
    flat |= {f"folded/{name}": tensor for name, tensor in snapshot.state.folded.tensors().items()}
    private = {name: state.tensors() for name, state in snapshot.private.items()}
    own = {  # copies: what a client has not trained yet is the global tensor itself
        name: {key: tensor.clone() for key, tensor in state.tensors().items()}
        for name, state in snapshot.own.items()
    }
    kept = {
        "client": snapshot.client_moments, "server": snapshot.server_moments, "private": private, "own": own,
    }  # fmt: skip
    for side, owners in kept.items():
        for owner, moments in owners.items():
            flat.update((f"{side}/{owner}/{name}", tensor) for name, tensor in moments.items())
    for line, tensors in snapshot.memories.items():
        flat.update((f"memory/{line}/{name}", tensor) for name, tensor in tensors.items())
    return {name: tensor.contiguous() for name, tensor in flat.items()}


def _by_owner(tensors: dict[str, torch.Tensor]) -> dict[str, Moments]:
    owners: dict[str, Moments] = {}
    for name, tensor in tensors.items():
        owner, _, rest = name.rpartition("/")
        owners.setdefault(owner, {})[rest] = tensor
    return owners


def _by_line(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """From `client/end/stream/name`; a client's name may have strokes of its own."""
    lines: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        line, stream, rest = name.rsplit("/", 2)
        lines.setdefault(line, {})[f"{stream}/{rest}"] = tensor
    return lines


def _numbers(run: Path) -> list[int]:
    folders = [folder for folder in (run / "checkpoints").glob("round-*") if folder.is_dir()]
    numbers = [folder.name.removeprefix("round-") for folder in folders]
    return sorted(int(number) for number in numbers if number.isdecimal())


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write them for all to read; safetensors' own `save_file` lets only the owner."""
    path.write_bytes(save(tensors))


def _flush(path: Path) -> None:
    """Make sure that the disk has it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
