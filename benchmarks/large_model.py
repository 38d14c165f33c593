"""Measure a client of a model of 1.1 billion parameters against training the whole model.

    random weights --save_pretrained--> 4 shards     D = 2048, L = 16, V = 32,000
    client, cut 2: embedding, blocks 0 and 1, head   against   transformers + peft: the whole model

Seconds of a step: client and server together, messages encoded, in turns with peft's step in one process.
Memory: each in a process of its own (`client_memory`), the server's messages being random numbers.
Shards: the kernel (inotify) names every file that the client's process opens.
Goals: the client's peak at most 0.35 of peft's, 0.15 with 4-bit blocks and 8-bit embedding and head; shards
that hold nothing of the client's are never opened.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from client_memory import SEQUENCES, TOKENS, client_step, status, stream_of_random_text, whole_step
from measuring import Spread, begin, interleaved, options, ratio, section, table
from random_checkpoint import LLAMA_1B, SMALL, random_checkpoint
from splitft.model import Model, open_model
from splitft.specs import ModelSpec
from step_overhead import BEST, LORA, PLAIN, plain_step, split_steps

CUT, SHARDS = 2, 4
WHOLE, CLIENT = "whole, transformers + peft", f"client, cut {CUT}"
HELD: Mapping[str, Mapping[str, Any]] = {
    WHOLE: {},
    CLIENT: {},
    f"{CLIENT}, nf4 blocks": {"quantize": "nf4"},
    f"{CLIENT}, nf4 blocks, int8 embedding and head": {"quantize": "nf4", "embedding": "int8"},
}
"""How each process holds the weights: keys of section `model`."""
GOALS = {CLIENT: 0.35, f"{CLIENT}, nf4 blocks, int8 embedding and head": 0.15}
"""Largest peak memory, relative to the whole model's."""
IN_OPEN, EVENT = 0x20, struct.Struct("iIII")


class OpenedFiles:
    """The files of a folder that any process opens from now on, as the kernel reports them (Linux)."""

    def __init__(self, folder: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._events = self._libc.inotify_init1(os.O_NONBLOCK)
        if self._libc.inotify_add_watch(self._events, os.fsencode(folder), IN_OPEN) < 0:
            raise OSError(ctypes.get_errno(), f"cannot watch {folder}")

    def names(self) -> set[str]:
        """Return the names of files opened so far."""
        found: set[str] = set()
        while True:
            try:
                data = os.read(self._events, 1 << 16)
            except BlockingIOError:
                return found
            while data:
                *_, length = EVENT.unpack_from(data)
                name, data = data[EVENT.size : EVENT.size + length], data[EVENT.size + length :]
                found.add(os.fsdecode(name.rstrip(b"\0")))


def measure(case: str, folder: str, dtype: str, seed: int) -> dict[str, Any]:
    """Run the first step of one case in this process; return its peak MiB and the shards it opened."""
    import peft  # noqa: F401  # all processes import the same libraries

    begin(seed, None)
    model = open_model(ModelSpec.model_validate({"name": folder, "dtype": dtype, **HELD[case]}))
    model.held_skeleton()  # imports the modelling code
    kind = model.dtype
    torch.ones(64, 64, dtype=kind) @ torch.ones(64, 64, dtype=kind)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    before, opened = status("VmRSS"), OpenedFiles(Path(folder))
    if case == WHOLE:
        whole_step(model, seed)
    else:
        client_step(model, CUT, "client", seed)
    shards = sorted(name for name in opened.names() if name.endswith(".safetensors"))
    return {"peak": status("VmHWM") - before, "shards": shards}


def in_a_process(case: str, folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Measure a case in a process of its own."""
    command = [sys.executable, __file__, "--case", case, "--folder", str(folder), "--dtype", chosen.dtype]
    done = subprocess.run(
        [*command, "--seed", str(chosen.seed)], stdout=subprocess.PIPE, text=True, check=True
    )
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def memory(folder: Path, repeats: int, chosen: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """Return the table of peaks and shards, and how the goals were met."""
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in HELD}
    for _ in range(repeats):
        for case in HELD:
            found[case].append(in_a_process(case, folder, chosen))
    peaks = {case: [one["peak"] for one in measured] for case, measured in found.items()}
    shards = {case: {name for one in measured for name in one["shards"]} for case, measured in found.items()}
    rows = [
        (
            case,
            f"{Spread.of(peaks[case]).median:.0f} MiB",
            ratio(peaks[case], peaks[WHOLE]),
            len(shards[case]),
        )
        for case in HELD
    ]
    goals = {
        f"goal, {case}, at most {most} of the whole": _verdict(ratio(peaks[case], peaks[WHOLE]).median, most)
        for case, most in ({} if chosen.quick else GOALS).items()
    }
    client = client_shards(open_model(ModelSpec(name=str(folder), dtype=chosen.dtype)))
    never = all(shards[case] == client for case in HELD if case != WHOLE)
    goals["shards that a client opened"] = (
        f"{', '.join(sorted(client))}, the only ones that hold parts of it" if never
        else f"missed: {shards} instead of {sorted(client)}"
    )  # fmt: skip
    return table(("process", "peak memory", "to whole", f"of {SHARDS} shards opened"), rows), goals


def client_shards(model: Model) -> set[str]:
    """Return the shards that hold the embedding, the blocks below the cut, and the head."""
    own = tuple(f"{name}." for name in model.block_names()[:CUT])
    blocks = tuple(f"{name}." for name in model.block_names())
    names = dict(model.skeleton().named_parameters())
    return set(model.checkpoint.files(n for n in names if n.startswith(own) or not n.startswith(blocks)))


def seconds(model: Model, steps: int, seed: int) -> tuple[str, str]:
    """Return the table of seconds of a step, and the ratio of the split step to peft's."""
    stream = stream_of_random_text(model, seed)
    trains = {name: plain_step(model, stream, PLAIN[name]) for name in ("plain", BEST)}
    trains |= split_steps(model, stream, seed, (CUT,))
    losses = dict.fromkeys(trains, 0.0)

    def recording(name: str) -> Callable[[], None]:
        return lambda: losses.update({name: trains[name]()})

    spent = interleaved({name: recording(name) for name in trains}, steps)
    rows = [
        (name, Spread.of(one), ratio(one, spent["plain"]), ratio(one, spent[BEST]), f"{losses[name]:.3f}")
        for name, one in spent.items()
    ]
    head = ("step", "seconds", "to plain", "to plain with all optimizations", "last loss")
    return table(head, rows), str(ratio(spent[f"split, cut {CUT}"], spent["plain"]))


def _verdict(found: float, most: float) -> str:
    return f"{found:.3f}, {'met' if found <= most else 'missed'}"


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--case", choices=HELD, help="measure one case in this process, as JSON")
    parser.add_argument("--folder", type=Path, help="where to keep the checkpoint for another time")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each variant")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each case")
    chosen = parser.parse_args()
    if chosen.case:
        print(json.dumps(measure(chosen.case, str(chosen.folder), chosen.dtype, chosen.seed)))
        return
    begin(chosen.seed, chosen.threads)
    sizes, steps, repeats = (SMALL, 2, 1) if chosen.quick else (LLAMA_1B, chosen.steps, chosen.repeats)
    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.folder or Path(scratch) / "model"
        parameters = random_checkpoint(folder, sizes, SHARDS, seed=chosen.seed)
        of_memory, goals = memory(folder, repeats, chosen)
        of_time, quotient = seconds(
            open_model(ModelSpec(name=str(folder), dtype=chosen.dtype)), steps, chosen.seed
        )
    print(
        section(
            "A model of 1.1 billion parameters",
            {
                "config": f"llama of {parameters / 1e9:.3f} billion parameters, random weights in {SHARDS} "
                f"shards, {chosen.dtype}, LoRA rank {LORA.rank} on attention, {SEQUENCES} x {TOKENS} random "
                "tokens, AdamW",
                "seed": chosen.seed,
                "spread": f"median of {repeats} processes, and of {steps} interleaved steps (middle half)",
                **goals,
                f"a split step at cut {CUT}, client and server, to peft's whole step": quotient,
            },
            of_memory,
            of_time,
        )
    )


if __name__ == "__main__":
    main()
