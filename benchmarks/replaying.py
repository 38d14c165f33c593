"""Common parts of the benchmarks of cuts: train once, and simulate the time of every way to choose cuts.

    real training of 10 clients --loss of each round--+
    fleet, way to choose cuts --clock--> seconds -----+--> seconds to a target, over those of `makespan`

With equal ranks the cut does not change the loss, so one training run gives the losses for every way to
choose cuts. Their times are simulated afterwards.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import splitft
from measuring import Parts, Spread
from splitft.config import RunConfig, from_mapping
from splitft.run.cut_schedule import CutSchedule
from splitft.run.plan import fleet_for
from splitft.schedule.workload import Fleet

FLEETS: dict[str, list[str]] = {
    "strongly unequal": ["phone"] * 3 + ["laptop"] * 2 + ["workstation"] * 5,
    "mildly unequal": ["laptop"] * 5 + ["edge-gpu"] * 5,
    "equal": ["laptop"] * 10,
}
ALPHAS, SEEDS = (0.1, 0.5, 10.0), (0, 1, 2)
SERVER, LINKS = "edge-gpu", "lan"
ROUNDS, STEPS = 4, 2
"""Of a run, by default."""
DROP = 0.8
"""The target is this share of the way from the first loss to the last."""
WAYS = ("best common cut", "cut 2", "resources", "paper", "makespan")
"""The ways to choose cuts."""
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
    """Return the configuration of a run of 10 clients; `changes` are keys of its schedule, and `cuts`."""
    text = {"source": str(data), "prompt": "mr", "completion": "ref"} if data.is_file() else {}
    return from_mapping({
        "model": {"dtype": "bfloat16"},
        "data": {**text, "max_tokens": 96, "max_examples": 1200, "eval_examples": 8},
        "clients": {"count": 10, "cuts": changes.pop("cuts", 2), "shares": {"by": "length", "alpha": alpha}},
        "lora": {"rank": 16, "rank_at_cut": rank_at_cut},
        "training": {"rounds": rounds, "steps": steps, "batch_size": 4, "lr": 1e-3},
        "wire": {"in_process": "direct"},
        "schedule": {"server": SERVER, "links": LINKS} | changes,
        "seed": seed,
    })  # fmt: skip


def trained(config: RunConfig, runs: Parts) -> dict[str, Any]:
    """Return the summary of a run; train it if no earlier part exists."""

    def make() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            return splitft.train(config, Path(folder) / "run").summary

    digest = hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:16]
    found: dict[str, Any] = runs.of(f"alpha {config.clients.shares.alpha} seed {config.seed} {digest}", make)
    return found


def replayed(config: RunConfig, fleet: Fleet, losses: list[dict[str, float]], rounds: int) -> list[float]:
    """Return the simulated seconds at the end of each round for a controller that sees these losses; 0.0
    first."""
    schedule, cuts = CutSchedule.begin(config, fleet)
    clock = [0.0]
    for number in range(1, rounds + 1):
        new = dict(schedule.choose(number, cuts, losses[number - 1]).cuts)
        clock.append(clock[-1] + schedule.charge(number, list(new), cuts, new).seconds)
        cuts = new
    return clock


def losses_by_client(summary: dict[str, Any]) -> list[dict[str, float]]:
    """Return each client's held-out loss before training and after each round."""
    rounds = len(summary["eval_loss"])
    return [{client["name"]: client["loss"][r] for client in summary["clients"]} for r in range(rounds)]


def seconds_to(target: float, losses: list[float], clock: list[float]) -> float:
    """Return the simulated seconds until the loss is reached, interpolated linearly between rounds."""
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
    """Return the clock of every way to choose cuts on one fleet.

    The server is as fast as `capacity` laptops; by default it is SERVER.
    """
    devices = FLEETS[fleet_name]
    fleet = _fleet(data, seed, alpha, fleet_name, SERVER)
    if capacity is not None:
        laptop = _fleet(data, seed, alpha, fleet_name, "laptop").costs.server
        device = replace(laptop.device.scaled(capacity), memory_bytes=float("inf"))
        fleet = replace(fleet, costs=replace(fleet.costs, server=replace(laptop, device=device)))
    works = [replace(one, workload=replace(one.workload, steps=steps)) for one in fleet.clients]
    fleet = replace(fleet, clients=tuple(works))

    def clock(**changes: Any) -> list[float]:
        config = configuration(data, seed, alpha, rounds=rounds, steps=steps, devices=devices, **changes)
        return replayed(config, fleet, losses, rounds)

    common = {cut: clock(cuts=cut) for cut in range(1, fleet.costs.sizes.blocks)}
    best = min(common, key=lambda cut: common[cut][-1])
    found = {f"best common cut ({best})": common[best], "cut 2": common[2]}
    return found | {name: clock(cuts="auto", controller=name) for name in controllers}


def target_of(losses: list[float]) -> float:
    """Return the target loss."""
    return losses[0] - DROP * (losses[0] - losses[-1])


def to_target(summary: dict[str, Any], clocks: dict[str, list[float]]) -> dict[str, float]:
    """Return the simulated seconds to the target of every way to choose cuts, by its name without the cut."""
    losses = summary["eval_loss"]
    target = target_of(losses)
    return {name.partition(" (")[0]: seconds_to(target, losses, clock) for name, clock in clocks.items()}


def against_makespan(times: list[dict[str, float]]) -> dict[str, Spread]:
    """Return the time of every way relative to `makespan`, over seeds."""
    return {name: Spread.of([one[name] / one["makespan"] for one in times]) for name in times[0]}


def cells(times: list[dict[str, float]]) -> list[str]:
    """Return the cells of a row: mean seconds and ratio to `makespan`, by WAYS."""
    ratios = against_makespan(times)
    return [f"{mean(one[name] for one in times):.2f} s, {ratios[name]}" for name in WAYS]


@functools.cache
def _fleet(data: Path, seed: int, alpha: float, fleet_name: str, server: str) -> Fleet:
    return fleet_for(configuration(data, seed, alpha, devices=FLEETS[fleet_name], server=server))


def said(least: float, most: float, goal: float) -> str:
    """Return the range over alphas, and whether the goal is met."""
    verdict = "met" if least >= goal else "met for some alpha" if most >= goal else "missed"
    return f"{least:.2f} to {most:.2f} by alpha, {verdict}"


def counted(devices: list[str]) -> str:
    """Describe a fleet in words."""
    return ", ".join(f"{devices.count(name)} {name}" for name in dict.fromkeys(devices))
