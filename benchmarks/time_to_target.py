"""Compare the methods' simulated seconds and MB to several losses, each at its own best learning rate.

    trajectories/  loss by round of each way to train --+
    method, wire, fleet --clock--> seconds a round -----+--> seconds to each target, over those of splitft

All methods have the same wire (bf16, then int8), the same optimizer policy and the same text. Methods that
are equal by law share the losses of one way (see `trajectories.py`), and differ in their clock. int8 is taken
to leave losses as they are (`codec_quality.py` measures what it changes). The targets lie between the best
loss of the weakest method and the least of any after the first round, so that none is reached in round 1.
Goal: `splitft` as it comes is never slower to any target than any other.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from measuring import REPOSITORY, begin, options, section, table
from splitft.config import RunConfig, from_mapping
from splitft.run.cut_schedule import CutSchedule
from splitft.run.plan import fleet_for
from trajectories import TEXTS, kept_file, settings

FLEETS: Mapping[str, Mapping[str, Any]] = {
    "unequal": {
        "devices": ["phone", "laptop", "workstation", "edge-gpu"],
        "links": ["lte", "dsl", "fibre", "fibre"],
        "server": "server-gpu",
    },
    "equal, slow links": {"devices": "laptop", "links": "dsl", "server": "server-gpu"},
    "equal, fast links": {"devices": "laptop", "links": "lan", "server": "server-gpu"},
}
WIRES = ("bf16", "int8")
OURS = "splitft"
METHODS: Mapping[str, str] = {
    "fedlora": "averaged",
    "splitfed-v1": "averaged",
    "splitfed-v2": "in turn",
    "splitlora": "in batch",
    "split": "handed on",
    "splitft-fixed": "averaged, lower rank at the cut",
}
"""The way to train whose losses each method has; that of splitft follows from what it chooses."""
WAY_OF_MODE: Mapping[str, str] = {
    "per-client": "averaged, lower rank at the cut",
    "shared": "in batch",
    "shared-in-turn": "in turn",
    "shared-by-arrival": "by arrival",
}
PARTS = (2 / 3, 1 / 3, 0.0)
"""Targets, as shares of the way from the lowest common loss up."""


def config_of(method: str, wire: str, fleet: str, chosen: argparse.Namespace) -> RunConfig:
    """Return the configuration of a method on a fleet; cuts are 2 where a method has one for all."""
    file, columns = TEXTS[chosen.text]
    shared = settings({"source": str(chosen.data / file), **columns}, chosen)
    return from_mapping({
        **shared,
        "method": method,
        "schedule": FLEETS[fleet],
        "wire": dict.fromkeys(("hidden", "gradient", "adapter"), wire) | {"in_process": "direct"},
    })  # fmt: skip


def clock_of(config: RunConfig) -> tuple[list[float], dict[str, int], str]:
    """Return the seconds at the end of each round (0.0 first), the cuts, and how server factors step."""
    schedule, cuts = CutSchedule.begin(config, fleet_for(config))
    clock = [0.0]
    for number in range(1, config.training.rounds + 1):
        clock.append(clock[-1] + schedule.charge(number, list(cuts), cuts, cuts).seconds)
    return clock, cuts, schedule.fleet.costs.server.adapters


def seconds_to(target: float, losses: Sequence[float], clock: Sequence[float]) -> float:
    """Return the simulated seconds until the loss is reached, interpolated between rounds; NaN if never."""
    for number, (before, after) in enumerate(pairwise(losses)):
        if after <= target:
            share = (before - target) / (before - after) if before > target else 0.0
            return clock[number] + share * (clock[number + 1] - clock[number])
    return math.nan


def targets_of(courses: Mapping[str, Sequence[Sequence[float]]]) -> list[float]:
    """Return the losses to reach, from the highest."""
    mean = {way: [statistics.fmean(at) for at in zip(*runs, strict=True)] for way, runs in courses.items()}
    lowest = max(min(course[1:]) for course in mean.values())
    first = min(course[1] for course in mean.values())
    return [lowest + max(0.0, first - lowest) * part for part in PARTS]


def rows_of(
    fleet: str, wire: str, courses: Mapping[str, Sequence[Sequence[float]]], chosen: argparse.Namespace
) -> list[list[str]]:
    """Return a row for each method: its seconds to each target, over those of splitft."""
    seconds, facts = dict[str, list[list[float]]](), dict[str, list[str]]()
    targets = targets_of(courses)
    for method in (OURS, *METHODS):
        clock, cuts, mode = clock_of(config_of(method, wire, fleet, chosen))
        way = WAY_OF_MODE[mode] if method == OURS else METHODS[method]
        if way not in courses:
            continue
        seconds[method] = [[seconds_to(one, course, clock) for course in courses[way]] for one in targets]
        facts[method] = [way, ", ".join(map(str, cuts.values())), f"{clock[-1]:.1f}"]
    rows = []
    for method, times in seconds.items():
        cells = []
        for ours, theirs in zip(seconds[OURS], times, strict=True):
            ratios = [
                b / a for a, b in zip(ours, theirs, strict=True) if math.isfinite(a) and math.isfinite(b)
            ]
            reached = [one for one in theirs if math.isfinite(one)]
            few = f" ({len(reached)} of {len(theirs)})" if len(reached) < len(theirs) else ""
            times_s = f"{statistics.median(reached):.1f} s" if reached else "never"
            cells.append(f"{times_s}{few}" + (f", {statistics.median(ratios):.2f}" if ratios else ""))
        rows.append([method, *facts[method], *cells])
    return rows


def read_courses(chosen: argparse.Namespace) -> dict[str, list[list[float]]]:
    """Return the losses of the ways that have been trained, a course for each seed."""
    found = {}
    for way in dict.fromkeys((*METHODS.values(), *WAY_OF_MODE.values())):
        file = kept_file(way, chosen)
        if file.is_file():
            kept = json.loads(file.read_text(encoding="utf-8"))
            found[way] = [one["losses"] for one in kept["seeds"].values()]
    least = min(map(len, found.values()), default=0)
    return {way: runs[:least] for way, runs in found.items()}


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared/data")
    parser.add_argument("--text", choices=list(TEXTS), default="e2e")
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=15, help="local steps of a round")
    parser.add_argument("--total", type=int, default=150, help="local steps of a client in all")
    parser.add_argument("--dtype", default="auto")
    chosen = parser.parse_args()
    begin(chosen.seed, chosen.threads)
    courses = read_courses(chosen)
    if len(courses) < 2:
        parser.error(f"fewer than two ways are trained for {chosen.text}; run trajectories.py first")
    parts = []
    for fleet in list(FLEETS)[: 1 if chosen.quick else None]:
        for wire in WIRES:
            targets = [f"to {one:.3f}" for one in targets_of(courses)]
            head = ("method", "losses of", "cuts", "all rounds, s", *targets)
            parts.append(f"{fleet}, {wire}:\n\n{table(head, rows_of(fleet, wire, courses, chosen))}")
    runs = len(next(iter(courses.values())))
    print(
        section(
            f"Time to a loss: {chosen.text}, alpha {chosen.alpha:g}, rounds of {chosen.steps}",
            {
                "config": f"losses of `trajectories.py --text {chosen.text} --alpha {chosen.alpha:g} --steps "
                f"{chosen.steps} --total {chosen.total}`, {runs} seeds; simulated clock",
                "cells": "median simulated seconds over seeds, and over those of splitft as it comes",
                "spread": "see the losses",
            },
            *parts,
        )
    )


if __name__ == "__main__":
    main()
