"""Measure the gain of a cut for each client over one common cut.

    real training of 10 clients --loss of each round--------+
    cuts of each controller --clock--seconds of each round--+--> loss against simulated time

With equal ranks the cut does not change the loss (`tests/laws/test_cut_invariance.py`; checked here on the
real model), so one training run gives the losses for all controllers, including `paper`, which reads them;
their times are simulated. With a lower rank at the cut the loss depends on the cuts, and each run is trained.
Baselines: the best common cut, chosen with hindsight on the simulated clock, and cut 2 for all as in the
paper. Machines and links are presets (`splitft.schedule.presets`); the last map varies the server's speed.

Goals: `makespan` reaches the target 1.5 times faster than the best common cut and 2 times faster than cut 2
on the strongly unequal fleet, and is never slower than 1.02 times the best common cut on the equal one.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

from drawing import lines
from measuring import REPOSITORY, Parts, Spread, begin, options, section, table
from replaying import (
    ALPHAS,
    DROP,
    FLEETS,
    GOALS,
    LINKS,
    ROUNDS,
    SEEDS,
    SERVER,
    STEPS,
    WAYS,
    against_makespan,
    cells,
    configuration,
    contenders,
    counted,
    losses_by_client,
    said,
    to_target,
    trained,
)

CAPACITIES = (1, 2, 4, 8, 16, 40, 87)
"""The server's speed as a multiple of a laptop's; 87 is the preset server-gpu."""
LONGER = (2, 10, 50)
"""Local steps of a round in the map."""


def speedups(
    data: Path, summaries: dict[tuple[float, int], dict[str, Any]], plots: Path
) -> tuple[list, dict]:
    """Return the rows of the main table, and the ratios for the goals."""
    rows, judged = [], {}
    for fleet_name in FLEETS:
        for alpha in ALPHAS:
            times = []
            for seed in SEEDS:
                summary = summaries[alpha, seed]
                clocks = contenders(data, seed, alpha, fleet_name, losses_by_client(summary))
                times.append(to_target(summary, clocks))
                if (alpha, seed) == (0.5, SEEDS[0]):
                    slug, total = fleet_name.replace(" ", "-"), summary["eval_loss"]
                    curves = {name: list(zip(clock, total, strict=True)) for name, clock in clocks.items()}
                    lines(plots / f"adaptive-cuts-{slug}.svg", f"Held-out loss, {fleet_name} fleet",
                          "simulated seconds", "loss (nats)", curves)  # fmt: skip
            ratios = against_makespan(times)
            for name in ("best common cut", "cut 2"):
                judged.setdefault((fleet_name, name), []).append(ratios[name])
            rows.append((fleet_name, alpha, *cells(times)))
    return rows, judged


def border(data: Path, summary: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Return the map: gain over the best common cut and over cut 2, by fleet, steps and the server's
    speed."""
    losses = losses_by_client(summary)
    rows = []
    for fleet_name in FLEETS:
        for steps in LONGER:
            gains = []
            for capacity in CAPACITIES:
                clocks = contenders(
                    data, SEEDS[0], 0.5, fleet_name, losses, capacity, 1, steps, ("makespan",)
                )
                best = next(clock for name, clock in clocks.items() if name.startswith("best"))
                ends = best[-1], clocks["cut 2"][-1], clocks["makespan"][-1]
                gains.append(f"{ends[0] / ends[2]:.2f} / {ends[1] / ends[2]:.2f}")
            rows.append((fleet_name, steps, *gains))
    return rows


def ranks_at_the_cut(data: Path, runs: Parts, seeds: tuple[int, ...]) -> list[tuple[Any, ...]]:
    """Return the final losses with rank 8 next to the cut and 16 elsewhere, by the way to choose cuts."""
    devices = FLEETS["strongly unequal"]
    ways = {
        "cut 2": {"cuts": 2},
        "best common cut": {},
        "makespan": {"cuts": "auto", "controller": "makespan"},
    }
    found: dict[str, list[float]] = {}
    for seed in seeds:
        equal = trained(configuration(data, seed, 0.5), runs)["eval_loss"][-1]
        found.setdefault("rank 16 everywhere, any cuts", []).append(equal)
        for name, changes in ways.items():
            if name == "best common cut":
                losses = losses_by_client(trained(configuration(data, seed, 0.5), runs))
                names = contenders(data, seed, 0.5, "strongly unequal", losses)
                best = next(one for one in names if one.startswith("best"))
                changes = {"cuts": int(best.partition("(")[2].rstrip(")"))}
            config = configuration(data, seed, 0.5, rank_at_cut=8, devices=devices, **changes)
            found.setdefault(f"rank 8 at the cut, {name}", []).append(trained(config, runs)["eval_loss"][-1])
    base = found["rank 16 everywhere, any cuts"]
    return [
        (name, f"{mean(losses):.4f}", Spread.of([a - b for a, b in zip(losses, base, strict=True)]))
        for name, losses in found.items()
    ]


def invariance(data: Path, runs: Parts) -> list[tuple[Any, ...]]:
    """Return the losses of every round at alpha 0.5, seed 0, with cut 2 for all and with makespan's cuts."""
    devices = FLEETS["strongly unequal"]
    ways = {
        "cut 2 for all": configuration(data, 0, 0.5),
        "makespan's cuts": configuration(data, 0, 0.5, devices=devices, cuts="auto", controller="makespan"),
    }
    return [
        (name, *(f"{loss:.4f}" for loss in trained(config, runs)["eval_loss"]))
        for name, config in ways.items()
    ]


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared/data/e2e/devset.csv")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/adaptive-cuts"), help="folder of finished runs"
    )
    chosen = parser.parse_args()
    begin(chosen.seed, chosen.threads)
    global ALPHAS, SEEDS
    if chosen.quick:
        ALPHAS, SEEDS = (0.5,), (0,)
    runs = Parts(chosen.work)
    plots = chosen.work if chosen.quick else REPOSITORY / "benchmarks/plots"
    summaries = {
        (alpha, seed): trained(configuration(chosen.data, seed, alpha), runs)
        for alpha in ALPHAS
        for seed in SEEDS
    }
    rows, judged = speedups(chosen.data, summaries, plots)
    same = invariance(chosen.data, runs)
    lowered = ranks_at_the_cut(chosen.data, runs, SEEDS)
    mapped = border(chosen.data, summaries[0.5, SEEDS[0]])
    (chosen.work / "found.json").write_text(
        json.dumps([rows, same, lowered, mapped], default=str), encoding="utf-8"
    )
    verdicts = {}
    for name in ("best common cut", "cut 2"):
        medians = [one.median for one in judged["strongly unequal", name]]
        verdicts[f"goal, strongly unequal, {GOALS[name]} times faster than {name}"] = said(
            min(medians), max(medians), GOALS[name]
        )
    slowest = min(one.low for one in judged["equal", "best common cut"])
    verdicts[f"goal, equal, never slower than {GOALS['equal']} times"] = (
        f"{1 / slowest:.3f} at most, {'met' if 1 / slowest <= GOALS['equal'] else 'missed'}"
    )
    print(
        section(
            "Adaptive cuts",
            {
                "config": f"smollm2-135m, bfloat16, 10 clients, length-Dirichlet, rank 16, {ROUNDS} "
                f"rounds of {STEPS} steps of 4 sequences, lr 1e-3; server {SERVER}, links {LINKS}",
                "fleets": "; ".join(f"{name}: {counted(devices)}" for name, devices in FLEETS.items()),
                "text": f"E2E ({chosen.data.name})" if chosen.data.is_file() else "python-docs (embedded)",
                "seeds": ", ".join(map(str, SEEDS)),
                "spread": "median over seeds of ratios to makespan on the same text (middle half)",
                "target": f"{DROP:.0%} of the way from the first held-out loss to the last",
                **verdicts,
            },
            "Simulated seconds to the target (mean), and ratio to `makespan`:",
            table(("fleet", "alpha", *WAYS), rows),
            "Where choosing helps. Time of the first round with the best common cut / with cut 2, over that "
            f"of `makespan`, by the server's speed in laptops (alpha 0.5, seed {SEEDS[0]}):",
            table(("fleet", "steps a round", *(f"{capacity}" for capacity in CAPACITIES)), mapped),
            "With equal ranks the cuts do not change the losses beyond the rounding of bfloat16 (held-out "
            "loss before training and after each round):",
            table(("cuts", *(f"round {r}" for r in range(ROUNDS + 1))), same),
            "With a lower rank at the cut they do (final held-out loss, strongly unequal fleet, alpha 0.5; "
            "difference to equal ranks):",
            table(("run", "loss, mean", "difference, median (middle half)"), lowered),
        )
    )


if __name__ == "__main__":
    main()
