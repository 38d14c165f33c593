"""Does any damaged or forged frame crash, hang, allocate without bound, or pass for a good one?

    damage    bit flips, truncation, extra bytes, spliced pieces, a lying prefix; checksums are then wrong
    forgery   right lengths and checksums around: another version, kind or codec; keys twice or missing; huge,
              negative and empty shapes; overlapping offsets; NaN and infinity; deep JSON; what is not UTF-8

Each frame goes through the same door as in a run (`Terms.from_bytes`). The first that is not met by a typed
refusal or a message that could have been sent ends the benchmark with an error; the tests play a share of
the same. With --guided, libFuzzer looks for new paths through the code (`pip install atheris`).
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
"""Growth of the process over all frames, at most."""


def resident_bytes() -> int:
    """Most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def guided(runs: int, seed: int) -> str:
    """What libFuzzer says at its end."""
    command = [sys.executable, str(TESTS / "wire/guided.py"), f"-runs={runs}", f"-seed={seed}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return (done.stdout + done.stderr).strip().splitlines()[-1]


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=101_000)
    parser.add_argument("--guided", type=int, default=0, help="runs of libFuzzer beside")
    chosen = parser.parse_args()
    count = 5_000 if chosen.quick else chosen.frames
    begin(chosen.seed, chosen.threads)
    frames = good_frames()
    attack(frames, 1000, chosen.seed + 1)  # what is loaded once is loaded now
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
        "frames": f"{tally.frames:,} mutated frames in {spent:.0f} s, from {len(frames)} good ones of every "
        f"kind of message and codec; {tally.refused.total():,} refused with a typed error, "
        f"{tally.accepted.total():,} were good frames after all (a number or a name changed and sealed anew)",
        "untyped errors, hangs, wrong acceptances": "0 (each would have ended the benchmark)",
        "slowest frame": f"{1000 * tally.slowest_s:.1f} ms",
        "memory": f"at most {tally.peak_bytes / 2**20:.1f} MiB for one frame ({tally.traced:,} traced; limit "
        f"{MOST_BYTES / 2**20:.0f}); the process grew by {growth / 2**20:.1f} MiB over all",
        "seed": chosen.seed,
    }
    if chosen.guided:
        facts["guided by coverage"] = guided(chosen.guided, chosen.seed)
    print(section("Mutated frames", facts, table(("mutation", "refused", "good after all"), rows)))


if __name__ == "__main__":
    main()
