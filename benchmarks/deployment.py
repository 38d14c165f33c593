"""Measure the overhead of FLARE on a step, and the effect of a connection lost for 3 s.

    1  round trip of a message over FLARE with certificates, and in this process       0.1, 1 and 8 MB
    2  messages of 1 MB with a 3 s outage: connections stall, or are closed and refused

A step has two round trips: hidden states for last hidden states, and gradients for gradients. FLARE's
overhead on a step is therefore twice the difference in 1. It is compared with a step of the real model with 1
MB of hidden states, with client and server in this process. Goals: overhead at 1 MB at most 10 % of the step;
no message lost, none answered wrongly. `in_flight.py` measures micro-batches in flight, and `throughput.py`
the number of sites.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from far_sites import Ground, ended, federation
from measuring import REPOSITORY, Spread, begin, options, section, table

NEAR, FAR = "near", "far"
MB = 10**6
SIZES = (MB // 10, MB, 8 * MB)
OVERHEAD_GOAL, JOB_S = 0.10, 240.0
CUT_S = 3.0
CUTS = {"stalled": "pull", "closed and refused": "sever"}
"""State of the connections in an outage, and the method of `SlowLine` that causes it."""


def measured(console: Any, folder: Path, stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run the stages in one FLARE job and return their results."""
    from echo_job import write_echo_job

    out = folder / f"{time.time_ns()}.json"
    job = console.submit(write_echo_job(folder / "job", stages, out))
    state = ended(console, job, JOB_S)
    if not out.is_file():
        raise SystemExit(f"the job {job} gave no result: {state}")
    found: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    return found


def stage(site: str, size: int, repeats: int) -> dict[str, Any]:
    return {"sites": [site], "size": size, "repeats": repeats, "lanes": 1}


def cut(ground: Ground, how: str, repeats: int) -> list[float]:
    """Return the seconds of each message of 1 MB, with an outage after a third of them."""
    line = ground.lines[FAR]
    at, gone = line.carried + 2 * MB * repeats // 3, threading.Event()

    def wait() -> None:
        while line.carried < at and not gone.wait(0.005):
            pass
        getattr(line, CUTS[how])(CUT_S)

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        (found,) = measured(ground.console, ground.folder, [stage(FAR, MB, repeats)])
    finally:
        gone.set()
        thread.join()
    return list(found["measured"][FAR]["seconds"])


def in_process(size: int, repeats: int) -> list[float]:
    """Return the seconds of messages that are answered by a direct call, with the same request ids."""
    from echo_job import Asking, Echo
    from splitft.deploy.requests import Direct

    found: list[float] = Asking(Direct("here", Echo(["here"]).answer)).ask(size, repeats, 1)["seconds"]
    return found


def real_step(path: Path, seed: int, steps: int) -> tuple[list[float], float]:
    """Return the seconds of real steps in this process, and the mean MB of their hidden states."""
    import step_overhead as one
    from splitft.model import open_model
    from splitft.specs import ModelSpec

    model = open_model(ModelSpec())
    row = model.shape.width * model.dtype.itemsize
    stream, _ = one.read_text(model, path, seed)
    mean = statistics.mean(size.tokens / size.sequences for size in stream.sizes())
    stream, _ = one.read_text(model, path, seed, batch=max(1, round(MB / row / mean)))
    step = one.split_steps(model, stream, seed)["split, cut 2"]
    step()
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    tokens = statistics.mean(sum(stream.batch(number).lengths) for number in range(1, steps + 1))
    return seconds, tokens * row / MB


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared/data/e2e/devset.csv")
    chosen = parser.parse_args()
    begin(chosen.seed, chosen.threads)
    few = chosen.quick
    repeats = {SIZES[0]: 10 if few else 200, SIZES[1]: 10 if few else 100, SIZES[2]: 4 if few else 24}
    step, step_mb = real_step(chosen.data, chosen.seed, 2 if few else 8)
    with tempfile.TemporaryDirectory(prefix="splitft-bench-") as scratch:
        folder = Path(scratch)
        with federation(folder, [NEAR], [FAR], ["echo_job."]) as ground:
            stages = [stage(NEAR, size, count) for size, count in repeats.items()]
            near = measured(ground.console, folder, stages)
            cuts = {how: cut(ground, how, 30 if few else 100) for how in CUTS}
    alone = {size: in_process(size, count) for size, count in repeats.items()}
    over = {size: near[i]["measured"][NEAR]["seconds"] for i, size in enumerate(SIZES)}
    cost = {size: 2 * (statistics.median(over[size]) - statistics.median(alone[size])) for size in SIZES}
    share = cost[MB] / statistics.median(step)
    verdict = (
        f"{share:.1%} of a step of {statistics.median(step):.2f} s with {step_mb:.2f} MB of hidden states"
    )
    asked = 30 if few else 100
    whole = all(len(seconds) == asked for seconds in cuts.values())
    print(
        section(
            "Deployment over FLARE",
            {
                "config": "server, a site and one behind a proxy, a process each; certificates on both "
                f"sides, tcp; {repeats} messages by size; real step: smollm2-135m, cut 2, in process",
                "seed": chosen.seed,
                "spread": "median (middle half)",
                f"goal, overhead at 1 MB at most {OVERHEAD_GOAL:.0%} of the step": f"{verdict}, "
                + ("met" if share <= OVERHEAD_GOAL else "missed"),
                f"goal, an outage of {CUT_S:.0f} s loses no message": "met" if whole else "missed",
            },
            table(
                ("MB each way", "FLARE, ms", "in this process, ms", "overhead on a step, ms"),
                [
                    (
                        f"{size / MB:g}",
                        Spread.of([1e3 * one for one in over[size]]),
                        Spread.of([1e3 * one for one in alone[size]]),
                        f"{1e3 * cost[size]:.1f}",
                    )
                    for size in SIZES
                ],
            ),
            table(
                (f"connections in an outage of {CUT_S:.0f} s", "answered", "ms a message", "longest, s"),
                [
                    (
                        how,
                        f"{len(seconds)} of {asked}",
                        Spread.of([1e3 * one for one in seconds]),
                        f"{max(seconds):.1f}",
                    )
                    for how, seconds in cuts.items()
                ],
            ),
        )
    )


if __name__ == "__main__":
    main()
