"""Measure the effect of each option of training on the loss after equally many examples.

    E2E, four unequal clients  --splitft with one option changed, equal examples-->  held-out loss

There are two baselines, because averaged products allow no server optimizer and no kept optimizer state:
splitft with its defaults, and splitft with equal ranks and averaged factors. Differences are paired by seed;
negative is better.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measuring import REPOSITORY, Parts, begin, options, section, table
from model_quality import FLEET, TEXTS, mean, run
from splitft.config import from_mapping

FACTORS = {"aggregate": {"rule": "factors"}, "lora": {"rank_at_cut": None}}
BASE, BASE_OF_FACTORS = "splitft", "factors averaged, equal ranks"
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    BASE: {},
    "split.server_adapters: shared-in-turn": {"split": {"server_adapters": "shared-in-turn"}},
    "split.server_adapters: shared": {"split": {"server_adapters": "shared"}},
    "training.warmup: 3": {"training": {"warmup": 3}},
    "training.schedule: cosine": {"training": {"schedule": "cosine"}},
    "lora.lr_ratio: 4": {"lora": {"lr_ratio": 4}},
    "lora.scaling: rslora": {"lora": {"scaling": "rslora"}},
    BASE_OF_FACTORS: FACTORS,
    "aggregate.server_optimizer: fedavgm": {**FACTORS, "aggregate": {
        "rule": "factors", "server_optimizer": "fedavgm"}},
    "aggregate.server_optimizer: nesterov": {**FACTORS, "aggregate": {
        "rule": "factors", "server_optimizer": "nesterov"}},
    "aggregate.server_optimizer: fedadam": {**FACTORS, "aggregate": {
        "rule": "factors", "server_optimizer": "fedadam"}},
    "training.optimizer_state: keep": {**FACTORS, "training": {"optimizer_state": "keep"}},
}  # fmt: skip
"""The keys that each option changes, by section."""


def config_of(changes: Mapping[str, Any], data: Mapping[str, Any], seed: int, rounds: int) -> Any:
    """Return the configuration of one run."""
    sections: dict[str, dict[str, Any]] = {
        "data": {"max_tokens": 96, "max_examples": 600, "eval_examples": 4, **data},
        "clients": {"count": 4, "shares": {"by": "length", "alpha": 0.5}},
        "lora": {"rank": 16, "alpha": 32},
        "training": {"rounds": rounds, "steps": 3, "batch_size": 4, "lr": 1e-3},
        "schedule": dict(FLEET),
        "wire": {"in_process": "direct"},
    }
    for name, values in changes.items():
        sections[name] = {**sections.get(name, {}), **values}
    return from_mapping({"method": "splitft", "seed": seed, **sections})


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared/data")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "splitft-training-options")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from --seed on")
    parser.add_argument("--rounds", type=int, default=2)
    chosen = parser.parse_args()
    begin(chosen.seed, chosen.threads)
    parts = Parts(chosen.work)
    file, columns = TEXTS["e2e"]
    path = chosen.data / file
    data = {"source": str(path), **columns} if path.is_file() else {"source": "python-docs"}
    seeds = range(chosen.seed, chosen.seed + (1 if chosen.quick else chosen.seeds))
    rounds = 1 if chosen.quick else chosen.rounds
    losses = {
        name: [run(config_of(changes, data, seed, rounds), parts)["losses"][-1] for seed in seeds]
        for name, changes in VARIANTS.items()
    }
    rows, base = [], BASE
    for name, found in losses.items():
        base = name if name in (BASE, BASE_OF_FACTORS) else base
        less = [one - other for one, other in zip(found, losses[base], strict=True)]
        rows.append((name, mean(found), "–" if name == base else mean(less)))
    print(
        section(
            "Training options",
            {
                "config": f"SmolLM2-135M, 4 clients, {rounds} rounds of 3 steps of 4 examples at each, "
                "alpha 0.5",
                "text": f"{file} by length" if path.is_file() else "python-docs",
                "seeds": ", ".join(map(str, seeds)),
                "spread": f"standard deviation over {len(seeds)} seeds",
            },
            table(("option", "held-out loss", f"minus {BASE}, or minus {BASE_OF_FACTORS}"), rows),
        )
    )


if __name__ == "__main__":
    main()
