"""Compare the methods' loss after equally many examples, and their simulated time to a target loss.

    E2E, GSM8K  x  alpha 0.1, 0.5, 10  x  seeds  --every method, equal examples, one fleet-->  held-out loss
                                                                            simulated seconds to the target

Goals: splitft's perplexity at most 1 % above fedlora's, and at alpha 10 at most 3 % above centralized; twice
as fast to the target as splitlora and as splitft-fixed with cut 2, on an unequal fleet. The target is the
higher of the two methods' final losses, which both reach; the loss between two evaluations is interpolated.

`splitft` has its defaults. `splitft, in turn, int8` sets two options: one copy of the server's adapters that
steps client by client (`split.server_adapters: shared-in-turn`), and int8 on the wire.

Each run is kept as JSON in the work folder, so that a stopped benchmark can be resumed, or run in parts
(`--only e2e --alpha 0.5`). hlora computes the same as flexlora here, and splitfed-v1 the same as fedlora
(tests/laws/test_methods.py), so they are not trained.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from measuring import REPOSITORY, Parts, begin, options, section, table
from splitft.config import from_mapping
from splitft.run.train import train

METHODS = (
    "centralized", "local", "fedlora", "flexlora", "split", "splitfed-v2", "splitlora", "splitft-fixed",
    "splitft",
)  # fmt: skip
RECIPE = "splitft, in turn, int8"
OPTIONS: Mapping[str, Any] = {
    "split": {"server_adapters": "shared-in-turn"},
    "wire": {"hidden": "int8", "gradient": "int8", "adapter": "int8", "in_process": "bytes"},
}
"""Options of the recipe."""
ALPHAS = (0.1, 0.5, 10.0)
FLEET = {
    "devices": ["phone", "laptop", "workstation", "edge-gpu"],
    "links": ["lte", "dsl", "fibre", "fibre"],
    "server": "server-gpu",
}
BEHIND, CENTRAL, SOONER = 1.01, 1.03, 2.0
TEXTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "e2e": ("e2e/devset.csv", {"prompt": "mr", "completion": "ref", "separator": " => "}),
    "gsm8k": ("gsm8k/train.jsonl", {"prompt": "question", "completion": "answer"}),
}
"""File and columns."""


def config_of(
    text: Mapping[str, Any], method: str, alpha: float, seed: int, chosen: argparse.Namespace
) -> Any:
    """Return the configuration of one run; a common cut is 2, and splitft's cuts are chosen for the fleet."""
    clients: dict[str, Any] = {"count": 4, "shares": {"by": "length", "alpha": alpha}}
    lora: dict[str, Any] = {"rank": 16, "alpha": 32}
    sections: dict[str, Any] = {"wire": {"in_process": "direct"}}
    if method == RECIPE:
        method, sections = "splitft", {**OPTIONS}
    return from_mapping({
        "method": method,
        "data": {"max_tokens": 96, "max_examples": 600, "eval_examples": 2 if chosen.quick else 4, **text},
        "clients": clients,
        "lora": lora,
        "training": {"rounds": 1 if chosen.quick else chosen.rounds, "steps": 1 if chosen.quick else 3,
                     "batch_size": 4, "lr": 1e-3},
        "schedule": FLEET,
        "seed": seed,
        **sections,
    })  # fmt: skip


def run(config: Any, parts: Parts) -> dict[str, Any]:
    """Return the losses and simulated seconds of a run; each run is trained once."""

    def make() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            summary = train(config, Path(folder) / "run").summary
        return {
            "losses": summary["eval_loss"],
            "seconds": summary["simulated_seconds"],
            "cuts": [client["cut"][-1] for client in summary["clients"]],
            "steps": summary["steps"],
        }

    digest = hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:16]
    found: dict[str, Any] = parts.of(f"{config.method} {digest}", make)
    return found


def seconds_to(run: Mapping[str, Any], target: float) -> float | None:
    """Return the simulated seconds until the loss is at most the target, for equal rounds; None if never."""
    losses = run["losses"]
    for number, (before, after) in enumerate(pairwise(losses)):
        if after <= target:
            within = (before - target) / (before - after) if before > target else 0.0
            return float(run["seconds"] * (number + within) / (len(losses) - 1))
    return None


def mean(values: Sequence[float]) -> str:
    """Format the mean over seeds and the sample's standard deviation."""
    middle = f"{statistics.fmean(values):.3f}"
    return middle if len(values) == 1 else f"{middle} ± {statistics.stdev(values):.3f}"


def judged(
    by_method: Mapping[str, Sequence[Mapping[str, Any]]], alpha: float, ours: str
) -> list[tuple[str, float, bool]]:
    """Return each goal of `ours`, its value, and whether it is met."""

    def perplexity(method: str) -> float:
        return math.exp(statistics.fmean([run["losses"][-1] for run in by_method[method]]))

    goals = [
        (f"perplexity over fedlora's, at most {BEHIND}", perplexity(ours) / perplexity("fedlora"), BEHIND)
    ]
    if alpha == ALPHAS[-1]:
        ratio = perplexity(ours) / perplexity("centralized")
        goals.append((f"perplexity over centralized's, at most {CENTRAL}", ratio, CENTRAL))
    verdicts = [(name, found, found <= most) for name, found, most in goals]
    for other in ("splitlora", "splitft-fixed"):
        ratios = []
        for one, theirs in zip(by_method[ours], by_method[other], strict=True):
            target = max(one["losses"][-1], theirs["losses"][-1])
            soon, late = seconds_to(one, target), seconds_to(theirs, target)
            if soon and late:
                ratios.append(late / soon)
        found = statistics.median(ratios) if ratios else math.nan
        verdicts.append((f"times as fast as {other}, at least {SOONER}", found, found >= SOONER))
    return verdicts


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared/data")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "splitft-model-quality")
    parser.add_argument("--only", choices=list(TEXTS), help="one text")
    parser.add_argument("--alpha", type=float, choices=ALPHAS, help="one alpha")
    parser.add_argument("--seeds", type=int, default=1, help="from --seed on; 3 for publication")
    parser.add_argument("--rounds", type=int, default=2)
    chosen = parser.parse_args()
    begin(chosen.seed, chosen.threads)
    runs = Parts(chosen.work)
    seeds = range(chosen.seed, chosen.seed + (1 if chosen.quick else chosen.seeds))
    alphas = [chosen.alpha] if chosen.alpha else list(ALPHAS[1:2] if chosen.quick else ALPHAS)
    names = [chosen.only] if chosen.only else list(TEXTS)[: 1 if chosen.quick else None]
    parts, verdicts = [], []
    for name in names:
        file, columns = TEXTS[name]
        path = chosen.data / file
        text = {"source": str(path), **columns} if path.is_file() else {"source": "python-docs"}
        for alpha in alphas:
            found = {
                method: [run(config_of(text, method, alpha, seed, chosen), runs) for seed in seeds]
                for method in (*METHODS, RECIPE)
            }
            rows = [
                (
                    method,
                    mean([one["losses"][0] for one in results]),
                    mean([one["losses"][-1] for one in results]),
                    f"{math.exp(statistics.fmean([one['losses'][-1] for one in results])):.2f}",
                    f"{statistics.fmean([one['seconds'] for one in results]):.1f}",
                    "whole" if max(results[0]["cuts"]) == 30 else ", ".join(map(str, results[0]["cuts"])),
                )
                for method, results in found.items()
            ]
            head = ("method", "loss before", "loss after", "perplexity", "simulated s", "cuts")
            where = name if path.is_file() else f"python-docs instead of {name}"
            parts.append(f"{where}, alpha {alpha:g}:\n\n{table(head, rows)}")
            verdicts += [
                (ours, name, f"{alpha:g}", goal, f"{value:.3f}", "met" if good else "missed")
                for ours in ("splitft", RECIPE)
                for goal, value, good in judged(found, alpha, ours)
            ]
    print(
        section(
            "Model quality by method",
            {
                "config": f"SmolLM2-135M, 4 clients, {1 if chosen.quick else chosen.rounds} rounds of "
                f"{1 if chosen.quick else 3} steps of 4 examples at each client (centralized takes all)",
                "fleet": "; ".join(
                    f"{d} on {n}" for d, n in zip(FLEET["devices"], FLEET["links"], strict=True)
                ),
                "seeds": ", ".join(map(str, seeds)),
                "spread": "standard deviation over seeds" if len(seeds) > 1 else "one seed: none",
            },
            *parts,
            "Goals, over seeds (perplexity of the mean loss; median of times):\n\n"
            + table(
                ("method", "text", "alpha", "goal", "found", ""), sorted(verdicts, key=lambda row: row[0])
            ),
        )
    )


if __name__ == "__main__":
    main()
