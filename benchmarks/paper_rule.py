"""Measure what cuts by performance are worth in quality over long runs: the paper's rule, and one that rests.

    controllers x seeds --real training, lower rank at the cut--> held-out loss, against that of fixed cuts
                        --simulated clock--> seconds of the run

With equal ranks in all blocks the cut changes no loss (`tests/laws/test_cut_invariance.py`), so there a rule
of cuts is worth nothing in quality, by law: only its seconds differ. With a lower rank next to the cut it
decides which blocks are poor, and may matter. All controllers train the same text with the same seeds from
the same first cuts, so differences are paired. `paper` drifts to the bounds: its cuts are printed.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from pathlib import Path
from statistics import mean
from typing import Any

from measuring import REPOSITORY, Parts, Spread, begin, options, section, table
from splitft.config import from_mapping
from splitft.run.train import train

CONTROLLERS = ("fixed", "resources", "paper", "performance", "makespan")
SEEDS = (0, 1, 2)
RANK, RANK_AT_CUT = 16, 4
CUT = 7
"""Cut of every client before the first round: a quarter of the model's blocks."""
DEVICES = ("phone", "laptop", "edge-gpu", "workstation")
TIMES = 2.0
"""A difference counts if it is larger than so many times the spread between seeds."""


def run(controller: str, seed: int, rounds: int, steps: int, chosen: Namespace) -> dict[str, Any]:
    """Train one run, and return its losses, cuts and seconds."""
    data, examples = chosen.data, 2 if chosen.quick else 16
    text = {"source": str(data), "prompt": "mr", "completion": "ref"} if data.is_file() else {}
    config = from_mapping({
        "model": {"dtype": chosen.dtype},
        "data": {**text, "max_tokens": 96, "max_examples": 2400, "eval_examples": examples},
        "clients": {"count": len(DEVICES), "cuts": CUT, "shares": {"by": "length", "alpha": 0.5}},
        "lora": {"rank": RANK, "rank_at_cut": RANK_AT_CUT},
        "training": {"rounds": rounds, "steps": steps, "batch_size": 4, "lr": 1e-3},
        "wire": {"in_process": "direct"},
        "schedule": {"controller": controller, "devices": list(DEVICES), "links": "lan"},
        "seed": seed,
    })  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        summary = train(config, Path(folder) / "run").summary
    return {
        "loss": summary["eval_loss"],
        "cuts": [list(cuts) for cuts in zip(*(one["cut"] for one in summary["clients"]), strict=True)],
        "seconds": summary["simulated_seconds"],
    }


def rows_of(runs: dict[tuple[str, int], dict[str, Any]], seeds: tuple[int, ...]) -> list[tuple[str, ...]]:
    """Return a row for each controller: loss, difference to fixed cuts, seconds, and cuts."""
    rows = []
    for controller in CONTROLLERS:
        finals = [runs[controller, seed]["loss"][-1] for seed in seeds]
        against = [final - runs["fixed", seed]["loss"][-1] for final, seed in zip(finals, seeds, strict=True)]
        one = runs[controller, seeds[0]]
        third, last = one["cuts"][len(one["cuts"]) // 3], one["cuts"][-1]
        rows.append((
            controller, f"{mean(finals):.4f}", str(Spread.of(against)),
            f"{mean(runs[controller, seed]['seconds'] for seed in seeds):.1f}",
            " ".join(map(str, one["cuts"][0])), " ".join(map(str, third)), " ".join(map(str, last)),
        ))  # fmt: skip
    return rows


def verdict(runs: dict[tuple[str, int], dict[str, Any]], controller: str, seeds: tuple[int, ...]) -> str:
    """Return whether a rule's final loss differs from that of fixed cuts by more than seeds do."""
    against = [runs[controller, seed]["loss"][-1] - runs["fixed", seed]["loss"][-1] for seed in seeds]
    fixed = [runs["fixed", seed]["loss"][-1] for seed in seeds]
    if len(seeds) < 2:
        return f"{against[0]:+.4f}, one seed: no verdict"
    spread = max(against) - min(against)
    better = "better" if mean(against) < 0 else "worse"
    said = better if abs(mean(against)) > TIMES * spread else "no difference above the spread of seeds"
    return f"{mean(against):+.4f} (seeds differ by {max(fixed) - min(fixed):.4f}): {said}"


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared/data/e2e/devset.csv")
    parser.add_argument("--work", type=Path, default=Path("runs/paper-rule"), help="folder of finished runs")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=15, help="local steps of a round")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--most", type=int, help="train at most so many runs now; the same command continues")
    chosen = parser.parse_args()
    begin(chosen.seed, chosen.threads)
    rounds, steps, seeds = (2, 1, SEEDS[:1]) if chosen.quick else (chosen.rounds, chosen.steps, SEEDS)
    parts = Parts(chosen.work, chosen.most)
    runs = {
        (controller, seed): parts.of(
            f"{controller} seed {seed} {rounds} x {steps} {chosen.dtype}",
            lambda controller=controller, seed=seed: run(controller, seed, rounds, steps, chosen),
        )
        for seed in seeds
        for controller in CONTROLLERS
    }
    facts = {
        "config": f"smollm2-135m, {chosen.dtype}, {len(DEVICES)} clients ({', '.join(DEVICES)}), by length, "
        f"alpha 0.5, rank {RANK}, {RANK_AT_CUT} next to the cut, {rounds} x {steps} steps of 4 "
        "(rounds x steps), lr 1e-3",
        "text": f"E2E ({chosen.data.name})" if chosen.data.is_file() else "python-docs (embedded)",
        "seeds": ", ".join(map(str, seeds)),
        "spread": "median over seeds of the difference to fixed cuts with the same seed (middle half)",
    }  # fmt: skip
    facts |= {f"{name} against fixed": verdict(runs, name, seeds) for name in CONTROLLERS[1:]}
    head = (
        "controller", "final loss, mean", "to fixed, median (middle half)", "simulated s",
        "cuts, round 1", "after a third", "last round",
    )  # fmt: skip
    print(section("The paper's rule over long runs", facts, table(head, rows_of(runs, seeds))))


if __name__ == "__main__":
    main()
