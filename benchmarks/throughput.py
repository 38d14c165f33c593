"""Measure a server's throughput by the number of sites, and estimate its limit.

    1  round trips of 1 MB messages from 1, 2, 4 and 8 sites at once, one process a site
    2  a real run of a small model with as many sites: steps and tokens a second in total

Each rate is given with the cores used by FLARE's server process, by our server's job and by all sites. A
Python process uses hardly more than one core, so rate / cores estimates the limit of each process with its
own core; the lower one is the server's limit on a machine with more cores.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from deployment import MB, measured
from far_sites import Busy, Ground, ended, federation
from in_flight import Case, model_of
from measuring import REPOSITORY, begin, options, section, table

COUNTS = (1, 2, 4, 8)
BLOCKS, CUT, ROUND_STEPS = 3, 1, 40
JOB_S = 400.0


def names(count: int) -> list[str]:
    return [f"site-{number}" for number in range(1, count + 1)]


def echoed(
    ground: Ground, counts: tuple[int, ...], repeats: int
) -> list[tuple[int, float, dict[str, float]]]:
    """Return for each number of sites the total messages a second, and the cores in use."""
    stages = [{"sites": names(n), "size": MB, "repeats": repeats, "lanes": 1} for n in counts]
    busy = Busy(ground)
    found = measured(ground.console, ground.folder, stages)
    busy.end()
    rows = []
    for count, result in zip(counts, found, strict=True):
        every = list(result["measured"].values())
        began, last = min(one["began"] for one in every), max(one["ended"] for one in every)
        rate = sum(len(one["seconds"]) for one in every) / (last - began)
        rows.append((count, rate, busy.cores(began, last)))
    return rows


def configured(model: str, sites: list[str], path: Path, seed: int, steps: int) -> Any:
    """Return the configuration of one round of training, after the first evaluation."""
    from splitft.config import from_mapping

    text: dict[str, Any] = {"source": "python-docs", "max_tokens": 64}
    if path.is_file():
        text = {"source": str(path), "prompt": "mr", "completion": "ref", "max_tokens": 96}
    return from_mapping({
        "model": {"name": model, "dtype": "bfloat16"},
        "data": {**text, "max_examples": 1600, "eval_examples": 2},
        "clients": {"count": len(sites), "cuts": CUT},
        "training": {"rounds": 1, "steps": steps, "batch_size": 4},
        "deploy": {"sites": sites},
        "seed": seed,
    })  # fmt: skip


def trained(ground: Ground, config: Any) -> tuple[float, float, dict[str, float]]:
    """Run one job; return total steps and tokens a second while all sites train, and the cores in use."""
    from splitft.deploy.flare.job import write_job
    from splitft.tracking.log import read_events

    busy = Busy(ground)
    job = ground.console.submit(write_job(ground.folder / "job", "run", config))
    state = ended(ground.console, job, JOB_S)
    busy.end()
    steps = [one for one in read_events(ground.runs / "run" / "events.jsonl") if one.event == "StepDone"]
    if len(steps) != config.training.steps * len(config.deploy.sites):
        raise SystemExit(f"the run did not train all its steps: {state}")
    warm = len(steps) // 5
    last = min(max(one.t for one in steps if one.client == site) for site in config.deploy.sites)
    counted = [one for one in steps[warm:] if one.t <= last]
    began, seconds = steps[warm - 1].t, counted[-1].t - steps[warm - 1].t
    tokens = sum(one.tokens for one in counted)
    return len(counted) / seconds, tokens / seconds, busy.cores(began, last)


def shares(rate: float, cores: dict[str, float]) -> list[str]:
    """Return the cores in use by kind, and the estimated limit of the busier server process."""
    servers = [cores[kind] for kind in Busy.KINDS[:2]]
    return [*(f"{cores[kind]:.2f}" for kind in Busy.KINDS), f"{rate / max(servers):.0f}"]


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared/data/e2e/devset.csv")
    chosen = parser.parse_args()
    begin(chosen.seed, chosen.threads)
    counts = COUNTS[:2] if chosen.quick else COUNTS
    each, steps = (20, 10) if chosen.quick else (100, ROUND_STEPS)
    runs = []
    with tempfile.TemporaryDirectory(prefix="splitft-bench-") as scratch:
        folder = Path(scratch)
        model = model_of(Case("small", BLOCKS, 4, steps), folder)
        for count in counts:
            with federation(folder / str(count), names(count), (), ["echo_job."]) as ground:
                if count == counts[-1]:
                    messages = echoed(ground, counts, each)
                config = configured(model, names(count), chosen.data, chosen.seed, steps)
                runs.append((count, *trained(ground, config)))
    one, eight = messages[0][1], messages[-1][1]
    heads = (
        *(f"cores of {kind}" for kind in Busy.KINDS),
        "limit of the busier server process, a second",
    )
    print(
        section(
            "Throughput by number of sites",
            {
                "config": f"a process a site, FLARE with certificates, tcp; messages: {each} of 1 MB a site; "
                f"runs: first {BLOCKS} blocks of smollm2-135m, cut {CUT}, 4 sequences a step, bf16",
                "text": f"E2E ({chosen.data.name})" if chosen.data.is_file() else "python-docs (embedded)",
                "seed": chosen.seed,
                f"total with {counts[-1]} sites": f"{eight:.0f} round trips of 1 MB a second "
                f"({2 * eight:.0f} MB/s), {eight / one:.2f} times one site's",
            },
            table(
                ("sites", "messages a second", "to one site", *heads),
                [
                    (n, f"{rate:.1f}", f"{rate / one:.2f}", *shares(rate, cores))
                    for n, rate, cores in messages
                ],
            ),
            table(
                ("sites", "steps a second", "tokens a second", "to one site", *heads),
                [
                    (n, f"{rate:.2f}", f"{tokens:.0f}", f"{rate / runs[0][1]:.2f}", *shares(rate, cores))
                    for n, rate, tokens, cores in runs
                ],
            ),
        )
    )


if __name__ == "__main__":
    main()
