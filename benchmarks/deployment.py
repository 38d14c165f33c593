"""What does the network engine cost a step, how many steps carries it, and what do batches in flight gain?

    1  one message there and back: over FLARE with certificates, and in this process       0.1, 1 and 8 MB
    2  messages a second of 1, 2 and 4 sites at once, each a process of its own             1 MB
    3  one and two messages in flight over a long line (a delaying proxy on loopback)       1 MB

A step is two messages there and back: hidden states against last hidden states, gradients against gradients.
So the engine's overhead on a step is twice the difference of 1. It is held against a step of the real model
whose hidden states are 1 MB, measured here, in this process, with client and server on the same cores.
3 is what the line itself allows: a site that computes while it waits gains less, and one whose steps
depend on each other gains nothing. Goals: overhead at 1 MB at most 10 % of the step; with 100 ms and two in
flight at least 1.6 times the messages of one.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from far_sites import ended, federation
from measuring import Spread, begin, options, section, table

SITES, FAR = ("site-1", "site-2", "site-3", "site-4"), "far"
MB = 10**6
SIZES = (MB // 10, MB, 8 * MB)
LINES = ((0.02, None), (0.1, None), (0.02, 20), (0.1, 20), (0.02, 100), (0.1, 100))
"""Round trip in seconds, and Mbit/s each way or None for what loopback gives."""
OVERHEAD_GOAL, IN_FLIGHT_GOAL = 0.10, 1.6
JOB_S = 240.0


def measured(console: Any, folder: Path, stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The stages' results, by one FLARE job."""
    from echo_job import write_echo_job

    out = folder / f"{time.time_ns()}.json"
    job = console.submit(write_echo_job(folder / "job", stages, out))
    state = ended(console, job, JOB_S)
    if not out.is_file():
        raise SystemExit(f"the job {job} gave no result: {state}")
    found: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    return found


def stage(sites: tuple[str, ...], size: int, repeats: int, lanes: int = 1) -> dict[str, Any]:
    return {"sites": list(sites), "size": size, "repeats": repeats, "lanes": lanes}


def rate(result: dict[str, Any]) -> float:
    """Messages a second of all sites of a stage together, from the first sent to the last answered."""
    every = list(result["measured"].values())
    spent = max(one["ended"] for one in every) - min(one["began"] for one in every)
    return sum(len(one["seconds"]) for one in every) / spent


def in_process(size: int, repeats: int) -> list[float]:
    """Seconds of messages whose answer is a call away, with the same numbering."""
    from echo_job import Asking, Echo
    from splitft.deploy.carrier import Direct

    found: list[float] = Asking(Direct("here", Echo(["here"]).answer)).ask(size, repeats, 1)["seconds"]
    return found


def real_step(seed: int, steps: int) -> tuple[list[float], float]:
    """Seconds of steps of the real model through bytes in this process, and the mean MB of hidden states."""
    import step_overhead as one
    from splitft.model import open_model
    from splitft.specs import ModelSpec

    model = open_model(ModelSpec())
    row = model.shape.width * model.dtype.itemsize
    path = one.REPOSITORY.parent / "shared/data/e2e/devset.csv"
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
    tokens = statistics.mean(stream.batch(number).real_tokens for number in range(1, steps + 1))
    return seconds, tokens * row / MB


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    chosen = parser.parse_args()
    begin(chosen.seed, chosen.threads)
    few = chosen.quick
    repeats = {SIZES[0]: 10 if few else 200, SIZES[1]: 10 if few else 100, SIZES[2]: 4 if few else 24}
    counts, each = (1, 2, 4), 10 if few else 80
    lines = LINES[1:4:2] if few else LINES
    step, step_mb = real_step(chosen.seed, 2 if few else 8)
    with tempfile.TemporaryDirectory(prefix="splitft-bench-") as scratch:
        folder = Path(scratch)
        with federation(folder) as (console, line):
            stages = [stage(SITES[:1], size, count) for size, count in repeats.items()]
            stages += [stage(SITES[:count], MB, each) for count in counts]
            near = measured(console, folder, stages)
            far = {}
            for round_trip, mbit in lines:
                line.round_trip_s = round_trip
                line.bytes_per_s = float("inf") if mbit is None else mbit * 1e6 / 8
                asked = 8 if few else 16
                far[round_trip, mbit] = measured(
                    console, folder, [stage((FAR,), MB, asked, lanes) for lanes in (1, 2)]
                )
    alone = {size: in_process(size, count) for size, count in repeats.items()}
    over = {size: near[i]["measured"][SITES[0]]["seconds"] for i, size in enumerate(SIZES)}
    cost = {size: 2 * (statistics.median(over[size]) - statistics.median(alone[size])) for size in SIZES}
    share = cost[MB] / statistics.median(step)
    gains = {key: rate(two) / rate(one) for key, (one, two) in far.items()}
    rates = [rate(one) for one in near[len(SIZES) :]]
    verdict = (
        f"{share:.1%} of a step of {statistics.median(step):.2f} s with {step_mb:.2f} MB of hidden states"
    )
    hard = gains[0.1, None]
    print(
        section(
            "Deployment over FLARE",
            {
                "config": "server, 4 sites and 1 behind a delaying proxy, a process each; certificates on "
                f"both sides, tcp; {repeats} messages by size; real step: smollm2-135m, cut 2, in process",
                "seed": chosen.seed,
                "spread": "median (middle half)",
                f"goal, overhead at 1 MB at most {OVERHEAD_GOAL:.0%} of the step": f"{verdict}, "
                + ("met" if share <= OVERHEAD_GOAL else "missed"),
                f"goal, 2 in flight at 100 ms at least {IN_FLIGHT_GOAL} times 1": f"{hard:.2f} on the line, "
                + ("met" if hard >= IN_FLIGHT_GOAL else "missed")
                + "; a run keeps one batch in flight so far, so this is what the line would allow it",
            },
            table(
                ("MB there and back", "FLARE, ms", "in this process, ms", "overhead on a step, ms"),
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
                ("sites at once", "messages of 1 MB a second, all together", "MB/s both ways", "to one site"),
                [
                    (count, f"{found:.1f}", f"{2 * found:.0f}", f"{found / rates[0]:.2f}")
                    for count, found in zip(counts, rates, strict=True)
                ],
            ),
            table(
                (
                    "round trip, ms",
                    "Mbit/s",
                    "messages a second, 1 in flight",
                    "2 in flight",
                    "gain",
                    "least s of one by the line",
                ),
                [
                    (
                        f"{1e3 * trip:.0f}",
                        mbit or "loopback",
                        f"{rate(one):.2f}",
                        f"{rate(two):.2f}",
                        f"{gains[trip, mbit]:.2f}",
                        f"{trip + (2 * MB * 8 / (mbit * 1e6) if mbit else 0):.3f}",
                    )
                    for (trip, mbit), (one, two) in far.items()
                ],
            ),
        )
    )


if __name__ == "__main__":
    main()
