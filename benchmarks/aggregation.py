"""Measure the aggregation error, the traffic and the held-out loss of each aggregation rule.

Four clients with four cuts train ranks 4 and 16, mixed over blocks and clients, on the E2E challenge; each
rule gets the same initial factors, batches and order. `factors` needs equal ranks, so it runs at rank 4
everywhere, the weakest client's rank, and at 16. The error is ||mean(BA) - result|| / ||mean(BA)||; for fedsa
it covers the blocks whose B is on the server.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import splitft
from measuring import REPOSITORY, Spread, begin, options, section, table
from splitft.config import from_mapping

MIXED = {"rank": 16, "rank_at_cut": 4, "cut_span": 8}
CUTS = (4, 12, 20, 26)
"""Of 30 blocks: with `cut_span` 8, every block is near one client's cut and far from another's."""
VARIANTS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "factors, all rank 4": ("factors", {"rank": 4, "rank_at_cut": None, "alpha": 8}),
    "factors, all rank 16": ("factors", {"rank": 16, "rank_at_cut": None}),
    "zero-pad": ("zero-pad", MIXED),
    "svd": ("svd", MIXED),
    "stack": ("stack", MIXED),
    "exact": ("exact", MIXED),
    "ffa": ("ffa", MIXED),
    "fedsa": ("fedsa", MIXED),
}
"""Name -> (rule, ranks). All have the scale alpha / rank = 2."""


def configuration(
    rule: str, lora: Mapping[str, Any], data: Mapping[str, Any], seed: int, rounds: int, steps: int, lr: float
) -> dict[str, Any]:
    """Return the configuration of one run."""
    return {
        "model": {"dtype": "bfloat16"},
        "data": {**data, "max_tokens": 64, "max_examples": 400, "eval_examples": 6},
        "clients": {"count": len(CUTS), "cuts": list(CUTS), "shares": {"by": "length", "alpha": 0.5}},
        "lora": {"alpha": 32, **lora},
        "training": {"rounds": rounds, "steps": steps, "batch_size": 4, "lr": lr},
        "aggregate": {"rule": rule},
        "wire": {"in_process": "direct"},
        "seed": seed,
    }


def row(name: str, summaries: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return a variant's row of the table, over seeds."""
    errors = [error for summary in summaries for error in summary["aggregation_error"]]
    adapter = [summary["bytes"]["adapter"] for summary in summaries]
    rounds = len(summaries[0]["aggregation_error"])
    sent = {way: Spread.of([one[way] / rounds / 1e6 for one in adapter]) for way in ("up", "down")}
    losses = Spread.of([summary["eval_loss"][-1] for summary in summaries])
    gained = Spread.of([summary["eval_loss"][0] - summary["eval_loss"][-1] for summary in summaries])
    error = Spread.of(errors)
    return (
        name,
        f"{error.median:.1e} ({error.low:.1e} to {error.high:.1e})",
        f"{sent['up'].median:.2f}",
        f"{sent['down'].median:.2f}",
        str(losses),
        str(gained),
    )


def read_from(path: Path) -> tuple[dict[str, Any], str]:
    """Return the section `data` for E2E, or for the embedded text if E2E is not available, and its name."""
    if path.is_file():
        return {"source": str(path), "prompt": "mr", "completion": "ref"}, f"E2E ({path.name})"
    return {"source": "python-docs"}, "python-docs (embedded)"


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared/data/e2e/devset.csv")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from --seed on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="local steps a round")
    parser.add_argument("--lr", type=float, default=1e-3)
    chosen = parser.parse_args()
    rounds, steps = (2, 1) if chosen.quick else (chosen.rounds, chosen.steps)
    seeds = range(chosen.seed, chosen.seed + (1 if chosen.quick else chosen.seeds))
    begin(chosen.seed, chosen.threads)
    data, what = read_from(chosen.data)
    began, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for name, (rule, lora) in VARIANTS.items():
            runs = []
            for seed in seeds:
                config = configuration(rule, lora, data, seed, rounds, steps, chosen.lr)
                runs.append(splitft.train(from_mapping(config), Path(folder) / f"{name}-{seed}").summary)
            rows.append(row(name, runs))
    print(
        section(
            "Aggregation rules",
            {
                "config": f"smollm2-135m, bfloat16, {len(CUTS)} clients, cuts {CUTS} of 30, {rounds} rounds "
                f"of {steps} steps of 4 sequences, lr {chosen.lr:g}; ranks 4 (8 blocks on both sides of a "
                "client's cut) and 16, alpha / rank 2",
                "text": f"{what}, by length, alpha 0.5",
                "seeds": ", ".join(map(str, seeds)),
                "spread": "median over seeds (for the error, also over rounds), and the middle half",
                "took": f"{(time.perf_counter() - began) / 60:.1f} minutes",
            },
            table(
                (
                    "rule",
                    "aggregation error",
                    "adapters up, MB a round",
                    "down",
                    "held-out loss",
                    "fell by",
                ),
                rows,
            ),
        )
    )


if __name__ == "__main__":
    main()
