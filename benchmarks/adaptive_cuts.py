"""When does choosing each client's cut help, and by how much?

    real training of 10 clients --loss of each round--------+
    cuts of each controller --clock--seconds of each round--+--> loss against simulated time

Where ranks are equal, the cut changes no loss (`tests/laws/test_cut_invariance.py`; shown here again on the
real model), so one training tells the losses of all controllers, `paper` among them, which sees them; their
times are replayed on the clock. Where the rank is lowered at the cut, loss depends on the cuts: those runs
are trained one by one. Baselines: the best of all common cuts, found by the clock itself with hindsight,
and cut 2 for all as in the paper. Machines and links are presets (`splitft.schedule.profile`); the map
scales the server.

Goals: `makespan` reaches the target 1.5 times faster than the best common cut and 2 times faster than cut 2
on the strongly unequal fleet, and is never slower than 1.02 times the best common cut on the equal one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import splitft
from drawing import lines
from measuring import REPOSITORY, Parts, Spread, begin, options, section, table
from splitft.assemble.pace import Pace
from splitft.assemble.planning import fleet_for
from splitft.config import RunConfig, from_mapping
from splitft.schedule.fleet import Fleet

FLEETS: dict[str, list[str]] = {
    "strongly unequal": ["phone"] * 3 + ["laptop"] * 2 + ["workstation"] * 5,
    "mildly unequal": ["laptop"] * 5 + ["edge-gpu"] * 5,
    "equal": ["laptop"] * 10,
}
ALPHAS, SEEDS = (0.1, 0.5, 10.0), (0, 1, 2)
SERVER, LINKS = "edge-gpu", "lan"
CAPACITIES = (1, 2, 4, 8, 16, 40, 87)
"""The server's speed as a multiple of a laptop's; 87 is the preset server-gpu."""
ROUNDS, STEPS = 4, 2
LONGER = (2, 10, 50)
"""Local steps of a round for which the border is drawn too."""
DROP = 0.8
"""The target is this share of the way from the first loss to the last."""
WAYS = ("best common cut", "cut 2", "resources", "paper", "makespan")
"""To choose cuts."""
GOALS = {"best common cut": 1.5, "cut 2": 2.0, "equal": 1.02}


def configuration(
    data: Path,
    seed: int,
    alpha: float,
    rank_at_cut: int | None = None,
    rounds: int = ROUNDS,
    steps: int = STEPS,
    **changes: Any,
) -> RunConfig:
    """A run of 10 clients; changes are to its schedule, and its cuts."""
    text = {"source": str(data), "prompt": "mr", "completion": "ref"} if data.is_file() else {}
    return from_mapping({
        "data": {**text, "max_tokens": 96, "max_examples": 1200, "eval_examples": 8},
        "clients": {"count": 10, "cuts": changes.pop("cuts", 2), "shares": {"by": "length", "alpha": alpha}},
        "lora": {"rank": 16, "rank_at_cut": rank_at_cut},
        "training": {"rounds": rounds, "steps": steps, "batch_size": 4, "lr": 1e-3},
        "wire": {"in_process": "direct"},
        "schedule": {"server": SERVER, "links": LINKS} | changes,
        "seed": seed,
    })  # fmt: skip


def trained(config: RunConfig, runs: Parts) -> dict[str, Any]:
    """The summary of a run, trained now or before."""

    def make() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            return splitft.train(config, Path(folder) / "run").summary

    digest = hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:16]
    found: dict[str, Any] = runs.of(f"alpha {config.clients.shares.alpha} seed {config.seed} {digest}", make)
    return found


def replayed(config: RunConfig, fleet: Fleet, losses: list[dict[str, float]], rounds: int) -> list[float]:
    """Simulated seconds at the end of each round, had this controller seen these losses; 0.0 first."""
    pace, cuts = Pace.begin(config, fleet)
    clock = [0.0]
    for number in range(1, rounds + 1):
        new = dict(pace.choose(number, cuts, losses[number - 1]).cuts)
        clock.append(clock[-1] + pace.charge(number, list(new), cuts, new).seconds)
        cuts = new
    return clock


def losses_by_client(summary: dict[str, Any]) -> list[dict[str, float]]:
    """Held-out losses before training and after each round."""
    rounds = len(summary["eval_loss"])
    return [{client["name"]: client["loss"][r] for client in summary["clients"]} for r in range(rounds)]


def seconds_to(target: float, losses: list[float], clock: list[float]) -> float:
    """Simulated seconds until the loss is met, on straight lines between rounds."""
    for number in range(1, len(losses)):
        before, after = losses[number - 1], losses[number]
        if after <= target:
            share = (before - target) / (before - after)
            return clock[number - 1] + share * (clock[number] - clock[number - 1])
    return float("nan")


def contenders(
    data: Path,
    seed: int,
    alpha: float,
    fleet_name: str,
    losses: list[dict[str, float]],
    capacity: float | None = None,
    rounds: int = ROUNDS,
    steps: int = STEPS,
    controllers: tuple[str, ...] = ("resources", "paper", "makespan"),
) -> dict[str, list[float]]:
    """The clock of every way to choose cuts, on one fleet, with a server of `capacity` laptops or SERVER."""
    devices = FLEETS[fleet_name]
    fleet = _fleet(data, seed, alpha, fleet_name, SERVER)
    if capacity is not None:
        laptop = _fleet(data, seed, alpha, fleet_name, "laptop").job.server
        device = laptop.device.scaled(capacity, memory_bytes=float("inf"))
        fleet = replace(fleet, job=replace(fleet.job, server=replace(laptop, device=device)))
    works = [replace(one, workload=replace(one.workload, steps=steps)) for one in fleet.clients]
    fleet = replace(fleet, clients=tuple(works))

    def clock(**changes: Any) -> list[float]:
        config = configuration(data, seed, alpha, rounds=rounds, steps=steps, devices=devices, **changes)
        return replayed(config, fleet, losses, rounds)

    common = {cut: clock(cuts=cut) for cut in range(1, fleet.job.sizes.blocks)}
    best = min(common, key=lambda cut: common[cut][-1])
    found = {f"best common cut ({best})": common[best], "cut 2": common[2]}
    return found | {name: clock(cuts="auto", controller=name) for name in controllers}


def target_of(losses: list[float]) -> float:
    """The loss that the clock is stopped at."""
    return losses[0] - DROP * (losses[0] - losses[-1])


def to_target(summary: dict[str, Any], clocks: dict[str, list[float]]) -> dict[str, float]:
    """Simulated seconds to the target of every way to choose cuts, by its name without the cut."""
    losses = summary["eval_loss"]
    target = target_of(losses)
    return {name.partition(" (")[0]: seconds_to(target, losses, clock) for name, clock in clocks.items()}


def against_makespan(times: list[dict[str, float]]) -> dict[str, Spread]:
    """How many times as long as `makespan` every way takes, from one run a seed."""
    return {name: Spread.of([one[name] / one["makespan"] for one in times]) for name in times[0]}


def cells(times: list[dict[str, float]]) -> list[str]:
    """Of a table: mean seconds and ratio to `makespan`, by WAYS."""
    ratios = against_makespan(times)
    return [f"{mean(one[name] for one in times):.2f} s, {ratios[name]}" for name in WAYS]


@functools.cache
def _fleet(data: Path, seed: int, alpha: float, fleet_name: str, server: str) -> Fleet:
    return fleet_for(configuration(data, seed, alpha, devices=FLEETS[fleet_name], server=server))


def speedups(
    data: Path, summaries: dict[tuple[float, int], dict[str, Any]], plots: Path
) -> tuple[list, dict]:
    """Rows of the main table, and the ratios that the goals are judged by."""
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
    """The map: gain over the best common cut and over cut 2, by fleet, steps and the server's speed."""
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
    """Final losses where the rank is 8 next to the cut and 16 elsewhere, by who chose the cuts."""
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
    """The losses of every round at alpha 0.5, seed 0, with cuts of 2 for all and with makespan's."""
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
        "--work", type=Path, default=Path("runs/adaptive-cuts"), help="finished runs are kept here"
    )
    chosen = parser.parse_args()
    begin(chosen.seed, chosen.threads)
    global ALPHAS, SEEDS
    if chosen.quick:
        ALPHAS, SEEDS = (0.5,), (0,)
    runs = Parts(chosen.work)
    plots = REPOSITORY / "benchmarks/plots"
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
            "Simulated seconds to the target (mean), and how many times as long as `makespan`:",
            table(("fleet", "alpha", *WAYS), rows),
            "The border. First round of the best common cut / of cut 2 over that of `makespan`, by the "
            "server's speed in laptops "
            f"(alpha 0.5, seed {SEEDS[0]}):",
            table(("fleet", "steps a round", *(f"{capacity}" for capacity in CAPACITIES)), mapped),
            "With equal ranks cuts change no loss beyond the rounding of bfloat16 (held-out loss "
            "before training and "
            "after each round):",
            table(("cuts", *(f"round {r}" for r in range(ROUNDS + 1))), same),
            "With a lower rank at the cut they do (final held-out loss, strongly unequal fleet, alpha 0.5; "
            "difference to equal ranks):",
            table(("run", "loss, mean", "difference, median (middle half)"), lowered),
        )
    )


def said(least: float, most: float, goal: float) -> str:
    """A verdict on what was found for the several alphas."""
    verdict = "met" if least >= goal else "met for some alpha" if most >= goal else "missed"
    return f"{least:.2f} to {most:.2f} by alpha, {verdict}"


def counted(devices: list[str]) -> str:
    """A fleet in words."""
    return ", ".join(f"{devices.count(name)} {name}" for name in dict.fromkeys(devices))


if __name__ == "__main__":
    main()
