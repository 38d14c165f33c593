"""Measure how long the demo takes, with and without instructions for bfloat16.

    splitft demo                                        `model.dtype: auto` takes what the processor has
    ONEDNN_MAX_CPU_ISA=... splitft demo                 the same processor without its bfloat16 instructions
    splitft train quickstart.yaml model.dtype=...       the type that auto does not take, where it can be said

Each runs in its own process, as a user starts it, and is timed from its start to its end: imports, training,
report and, for the demo, the two sentences that it writes. Set-up is not included, nor is the download of
anything. Goal: at most 120 s on two cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import REPOSITORY, begin, options, section, table

GOAL_S = 120
WITHOUT = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}
"""The instructions before bfloat16: those of Intel's Cascade Lake."""
SHORT = ("training.rounds=1", "training.steps=1", "data.eval_examples=1")


def timed(words: list[str], variables: dict[str, str]) -> tuple[float, str, str]:
    """Run a verb of splitft; return its seconds, the type it says it took, and its losses."""
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, "-c", "from splitft.cli import main; main()", *words]
        began = time.perf_counter()
        done = subprocess.run(
            [*program, "--out", str(Path(folder) / "run")],
            env=os.environ | {"HF_HUB_OFFLINE": "1"} | variables,
            capture_output=True,
            text=True,
            check=True,
        )
        seconds = time.perf_counter() - began
    first = done.stdout.splitlines()[0]
    losses = next(line for line in done.stdout.splitlines() if line.startswith("Held-out loss"))
    return seconds, first.partition(" in ")[2].partition(" ")[0], losses.partition(": ")[2].partition(" (")[0]


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument(
        "--no-other-type", action="store_true", help="leave out the type that auto does not take"
    )
    chosen = parser.parse_args()
    begin(chosen.seed, chosen.threads)
    quickstart = ["train", str(REPOSITORY / "examples/quickstart.yaml")]
    verb = [*quickstart, *SHORT] if chosen.quick else ["demo"]
    threads = {"OMP_NUM_THREADS": str(chosen.threads)} if chosen.threads else {}
    rows, slowest = [], 0.0
    for processor, limits in (("as it is", {}), ("without bfloat16", WITHOUT)):
        seconds, dtype, losses = timed(verb, threads | limits)
        slowest = max(slowest, seconds)
        rows.append((processor, f"auto: {dtype}", f"{seconds:.0f}", losses))
        if not chosen.no_other_type:
            other = "float32" if dtype == "bfloat16" else "bfloat16"
            words = [*quickstart, *(SHORT if chosen.quick else ()), f"model.dtype={other}"]
            seconds, _, losses = timed(words, threads | limits)
            rows.append((processor, other, f"{seconds:.0f}", losses))
    verdict = f"{slowest:.0f} s, {'met' if slowest <= GOAL_S else 'missed'}"
    print(
        section(
            "Demo",
            {
                "config": "`splitft demo`, and examples/quickstart.yaml with the type that auto does not take"
                + (" (a short one)" if chosen.quick else ""),
                "seed": chosen.seed,
                "without bfloat16": " ".join(f"{name}={value}" for name, value in WITHOUT.items()),
                f"goal, at most {GOAL_S} s with model.dtype: auto": verdict,
            },
            table(("processor", "model.dtype", "seconds", "held-out loss"), rows),
        )
    )


if __name__ == "__main__":
    main()
