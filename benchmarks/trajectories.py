"""Find the loss that each distinct way to train reaches, each at its own best learning rate of three.

    every way x 3 rates --successive halving, second half of the held-out text--> its rate
    its rate x seeds    --rounds of local steps--> loss on the first half, by round

Ways that are equal by law are trained once: per-client factors at one rank and averaged factors have the
same losses at every cut, so `averaged` is fedlora, splitfed-v1 and splitft with such options
(tests/laws/test_methods.py). Time is not measured here: `time_to_target.py` replays these losses on clocks.

A run goes on from its last round in the work folder when the benchmark starts again. Finished runs are kept
as JSON beside the benchmarks, in `trajectories/`, so that the figures can be made in parts (`--only`).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from measuring import REPOSITORY, begin, environment, options, section, table
from splitft.compare.budget import UNBOUNDED, train_within
from splitft.compare.rows import ComparisonRow, plan_row
from splitft.compare.tuning import FINAL_PART, choose, plan_candidates
from splitft.tracking.events import Event, RoundDone

KEPT = REPOSITORY / "benchmarks/trajectories"
RATES = ("3e-4", "1e-3", "3e-3")
GRID = {"training.lr": RATES}
SPLIT = ("clients.cuts=2",)
NESTEROV = ("aggregate.server_optimizer=nesterov",)
LORA_PLUS = ("lora.lr_ratio=16",)
ONE_RANK = ("lora.rank_at_cut=null", "aggregate.rule=factors")


@dataclass(frozen=True)
class Way:
    """A way to train with losses of its own."""

    method: str
    overrides: tuple[str, ...] = ()
    equals: str = ""
    """The methods and options that have these losses too, by law."""


WAYS: Mapping[str, Way] = {
    "averaged": Way("fedlora", equals="fedlora, splitfed-v1, splitft with one rank and factors"),
    "averaged, lower rank at the cut": Way("splitft", SPLIT, "splitft's defaults with cut 2"),
    "in batch": Way("splitlora", SPLIT, "splitlora"),
    "in turn": Way("splitfed-v2", SPLIT, "splitfed-v2"),
    "by arrival": Way("splitft", (*SPLIT, *ONE_RANK, "split.server_adapters=shared-by-arrival")),
    "handed on": Way("split", SPLIT, "split"),
    "centralized": Way("centralized"),
    "local": Way("local"),
    "averaged, Nesterov": Way("fedlora", NESTEROV),
    "averaged, LoRA+": Way("fedlora", LORA_PLUS),
    "averaged, Nesterov, LoRA+": Way("fedlora", (*NESTEROV, *LORA_PLUS)),
    "in turn, Nesterov": Way("splitfed-v2", (*SPLIT, *NESTEROV)),
    "in turn, LoRA+": Way("splitfed-v2", (*SPLIT, *LORA_PLUS)),
}
TEXTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "e2e": ("e2e/devset.csv", {"prompt": "mr", "completion": "ref", "separator": " => "}),
    "gsm8k": ("gsm8k/train.jsonl", {"prompt": "question", "completion": "answer"}),
}
"""File and columns."""


def settings(text: Mapping[str, Any], chosen: argparse.Namespace) -> dict[str, Any]:
    """Return the configuration that all ways share."""
    steps = 2 if chosen.quick else chosen.steps
    return {
        "model": {"dtype": chosen.dtype},
        "data": {"max_tokens": 96, "max_examples": 4000, "eval_examples": 16, **text},
        "clients": {"count": 4, "shares": {"by": "length", "alpha": chosen.alpha}},
        "lora": {"rank": 16, "alpha": 32},
        "wire": {"in_process": "direct"},
        "training": {
            "rounds": 2 if chosen.quick else max(1, chosen.total // steps),
            "steps": steps,
            "batch_size": 4,
        },
    }


def say(row: ComparisonRow, event: Event) -> None:
    """Print a line for each round."""
    if isinstance(event, RoundDone):
        print(f"  {row.name}: round {event.round}", file=sys.stderr, flush=True)


def kept_file(name: str, chosen: argparse.Namespace) -> Path:
    """Return the file of a way under these conditions."""
    label = name.replace(", ", "-").replace(" ", "-").replace("+", "-plus").lower()
    return KEPT / f"{chosen.text}-alpha{chosen.alpha:g}-{chosen.total}x{chosen.steps}-{label}.json"


def trained(name: str, file: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Return the chosen rate of a way, and its losses by seed and round; train what is missing."""
    way, kept = WAYS[name], kept_file(name, chosen)
    found: dict[str, Any] = {"rate": None, "tried": [], "seeds": {}}
    if kept.is_file() and not chosen.quick:
        found = json.loads(kept.read_text(encoding="utf-8"))
    out = chosen.work / name.replace(" ", "-")
    if found["rate"] is None:
        candidates = plan_candidates(file, way.method, chosen.seed, out, way.overrides, GRID)
        choice = choose(candidates, UNBOUNDED, say)
        found["rate"], found["tried"] = choice.values["training.lr"], choice.as_data()["tried"]
        for one in found["tried"]:
            del one["folder"]
    for seed in range(chosen.seed, chosen.seed + (1 if chosen.quick else chosen.seeds)):
        if str(seed) in found["seeds"]:
            continue
        given = [*way.overrides, f"training.lr={found['rate']}", FINAL_PART]
        row = plan_row(file, way.method, seed, out, given)
        points = train_within(row.config, row.folder, UNBOUNDED, [lambda event, row=row: say(row, event)])
        found["seeds"][str(seed)] = {"losses": [point.loss for point in points], **environment()}
        if not chosen.quick:
            KEPT.mkdir(exist_ok=True)
            kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def row_of(name: str, found: Mapping[str, Any]) -> list[str]:
    """Return the row of a way: its rate, its losses on the way, and at the end."""
    courses = [one["losses"] for one in found["seeds"].values()]
    last = len(courses[0]) - 1
    marks = [max(1, last // 4), max(1, last // 2), last]
    rates = [float(one["values"]["training.lr"]) for one in found["tried"]]
    edge = " (edge)" if float(found["rate"]) in (min(rates), max(rates)) else ""
    return [
        name,
        f"{found['rate']}{edge}",
        *(_spread([course[mark] for course in courses]) for mark in marks),
        _spread([min(course) for course in courses]),
        f"{math.exp(statistics.fmean([course[-1] for course in courses])):.3f}",
        WAYS[name].equals,
    ]


def _spread(values: Sequence[float]) -> str:
    middle = f"{statistics.fmean(values):.3f}"
    return middle if len(values) == 1 else f"{middle} ± {statistics.stdev(values):.3f}"


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared/data")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "splitft-trajectories")
    parser.add_argument("--text", choices=list(TEXTS), default="e2e")
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=15, help="local steps of a round")
    parser.add_argument("--total", type=int, default=150, help="local steps of a client in all")
    parser.add_argument("--seeds", type=int, default=3, help="from --seed on")
    parser.add_argument("--dtype", default="auto", help="model.dtype; auto takes what is native here")
    parser.add_argument("--only", choices=list(WAYS), nargs="+", help="some of the ways")
    chosen = parser.parse_args()
    begin(chosen.seed, chosen.threads)
    file, columns = TEXTS[chosen.text]
    path = chosen.data / file
    text = {"source": str(path), **columns} if path.is_file() else {"source": "python-docs"}
    if chosen.quick:
        chosen.work = Path(tempfile.mkdtemp())
    chosen.work.mkdir(parents=True, exist_ok=True)
    written = chosen.work / "settings.yaml"
    written.write_text(yaml.safe_dump(settings(text, chosen)), encoding="utf-8")
    names = chosen.only or (list(WAYS)[:1] if chosen.quick else list(WAYS))
    rows = [row_of(name, trained(name, written, chosen)) for name in names]
    head = ("way", "rate", "loss, 1/4", "1/2", "at the end", "lowest", "perplexity", "also")
    print(
        section(
            f"Loss by way to train: {chosen.text}, alpha {chosen.alpha:g}, rounds of {chosen.steps}",
            {
                "config": f"SmolLM2-135M, 4 clients, {chosen.total} steps of 4 examples at each (centralized "
                f"takes all), rank 16, rates {', '.join(RATES)}",
                "seed": f"{chosen.seed} to {chosen.seed + chosen.seeds - 1}; rate chosen on {chosen.seed}",
                "spread": "standard deviation over seeds",
            },
            table(head, rows),
        )
    )


if __name__ == "__main__":
    main()
