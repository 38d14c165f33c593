"""Check that no mutated frame crashes, hangs, allocates without bound, or is wrongly accepted.

    damage    bit flips, truncation, extra bytes, spliced pieces, a wrong prefix; checksums are then wrong
    forgery   valid lengths and checksums, but another version, kind or codec; keys twice or missing; huge,
              negative and empty shapes; overlapping offsets; NaN and infinity; deep JSON; invalid UTF-8

Each frame is read as in a run (`MessageSerializer.from_bytes`). It must raise a typed error or give a message
that could have been sent; anything else ends the benchmark with an error. The tests run a smaller number of
the same mutations. With --guided, libFuzzer searches for new code paths (`pip install atheris`).
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

from measuring import REPOSITORY, begin, options, section, table

TESTS = REPOSITORY / "tests"
sys.path.insert(0, str(TESTS))

from protocol.judge import MOST_BYTES, attack, good_frames  # noqa: E402
from protocol.mutations import MUTATIONS  # noqa: E402

MOST_GROWTH = 64 * 2**20
"""Limit for the growth of the process over all frames."""


def resident_bytes() -> int:
    """Return the peak memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def guided(runs: int, seed: int) -> str:
    """Run libFuzzer and return the last line of its output."""
    command = [sys.executable, str(TESTS / "protocol/guided.py"), f"-runs={runs}", f"-seed={seed}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return (done.stdout + done.stderr).strip().splitlines()[-1]


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=101_000)
    parser.add_argument("--guided", type=int, default=0, help="also this many runs of libFuzzer")
    chosen = parser.parse_args()
    count = 5_000 if chosen.quick else chosen.frames
    begin(chosen.seed, chosen.threads)
    frames = good_frames()
    attack(frames, 1000, chosen.seed + 1)  # a warm-up
    before, began = resident_bytes(), time.perf_counter()
    tally = attack(frames, count, chosen.seed)
    spent, growth = time.perf_counter() - began, resident_bytes() - before
    if growth > MOST_GROWTH:
        raise SystemExit(f"the process grew by {growth / 2**20:.0f} MiB")
    rows = [
        (one.__name__.replace("_", " "), tally.refused[one.__name__], tally.accepted[one.__name__])
        for one in MUTATIONS
    ]
    facts = {
        "frames": f"{tally.frames:,} mutated frames in {spent:.0f} s, from {len(frames)} valid ones of every "
        f"kind of message and codec; {tally.refused.total():,} refused with a typed error, "
        f"{tally.accepted.total():,} valid (a number or a name changed, with a new checksum)",
        "untyped errors, hangs, wrong acceptances": "0 (any would end the benchmark)",
        "slowest frame": f"{1000 * tally.slowest_s:.1f} ms",
        "memory": f"at most {tally.peak_bytes / 2**20:.1f} MiB for one frame ({tally.traced:,} traced; limit "
        f"{MOST_BYTES / 2**20:.0f}); the process grew by {growth / 2**20:.1f} MiB over all",
        "seed": chosen.seed,
    }
    if chosen.guided:
        facts["coverage-guided"] = guided(chosen.guided, chosen.seed)
    print(section("Mutated frames", facts, table(("mutation", "refused", "valid"), rows)))


if __name__ == "__main__":
    main()
