"""Measure whether the final adapter reveals which texts it was trained on.

Every method trains on half of a small corpus, long enough to overfit; the other half is held out by the same
clients. Two attacks score every text: the loss under the adapter, and how much lower it is than under the
base model. AUCs are of several runs, each with its own members; "found" is the share of members found at a
false positive rate of 1 in 20. Methods are configurations: one client for centralized, one rank everywhere
for fedlora (the cut changes only where blocks run, not what is trained), and splitft with its own cuts.
"""

from __future__ import annotations

import functools
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import splitft
from measuring import REPOSITORY, Parts, begin, options, section, table
from membership_attack import Membership, by_gain, by_loss, losses
from splitft.config import RunConfig, from_mapping
from splitft.data.holdout import held_out
from splitft.data.text import Example
from splitft.model import open_model
from splitft.peft_folder import with_adapter
from splitft.run.inputs import divide_text

MANY = {"clients": {"count": 4, "cuts": [2, 5, 10, 15], "shares": {"by": "iid"}}}
SMALL = {"lora": {"rank": 1, "rank_at_cut": None}, "aggregate": {"rule": "zero-pad"}}
BATCH = 4
METHODS: dict[str, dict[str, Any]] = {
    "centralized": {"clients": {"count": 1, "cuts": 5, "shares": {"by": "iid"}}},
    "fedlora": {**MANY, "lora": {"rank": 16, "rank_at_cut": None}},
    "splitft": MANY,
    "splitft, rank 1": {**MANY, **SMALL},
    "splitft, rank 1, updates clipped to 0.1": {
        **MANY,
        **SMALL,
        "privacy": {"updates": {"clip_norm": 0.1}},
    },
    "splitft, rank 1, and noise 1": {
        **MANY,
        **SMALL,
        "privacy": {"updates": {"clip_norm": 0.1, "noise_multiplier": 1.0}},
    },
}
"""Sections that each method adds to the configuration."""


def members_and_others(config: RunConfig) -> tuple[list[Example], list[Example]]:
    """Return the examples that the run's clients train on, and those that they hold out."""
    divided = divide_text(config, open_model(config.model))
    members: list[Example] = []
    others: list[Example] = []
    for client, part in enumerate(divided.parts):
        own = [divided.text.examples[index] for index in part]
        trained, kept_out = held_out(own, config.data.holdout, config.seed, client)
        members += trained
        others += kept_out
    return members, others


def judged(config: RunConfig, run: splitft.Run, most: int) -> tuple[Membership, Membership, float, float]:
    """Run both attacks on a finished run; also return the mean losses of members and others."""
    model = open_model(config.model)
    members, others = (sample(texts, most, config.seed) for texts in members_and_others(config))
    whole = with_adapter(run.adapter_dir, model)
    known, unknown = losses(whole, members), losses(whole, others)
    with whole.disable_adapter():
        base_known, base_unknown = losses(whole, members), losses(whole, others)
    gain = by_gain(known, unknown, base_known, base_unknown)
    return by_loss(known, unknown), gain, float(known.mean()), float(unknown.mean())


def sample(texts: Sequence[Example], most: int, seed: int) -> list[Example]:
    """Draw at most so many of them at random."""
    if len(texts) <= most:
        return list(texts)
    drawn = np.random.default_rng(seed).choice(len(texts), most, replace=False)
    return [texts[index] for index in np.sort(drawn)]


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared/data/e2e/devset.csv")
    parser.add_argument("--seeds", type=int, default=3, help="runs of a method, each with its own members")
    parser.add_argument("--work", type=Path, help="folder of finished runs, to resume from")
    chosen = parser.parse_args()
    begin(chosen.seed, chosen.threads)
    e2e = chosen.data.is_file()
    text = {"source": str(chosen.data), "prompt": "mr", "completion": "ref"} if e2e else {"max_tokens": 64}
    examples, epochs, seeds = (16, 1, 1) if chosen.quick else (96, 5, chosen.seeds)
    members = examples // 2
    rounds = 1 if chosen.quick else 3
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        parts = Parts(chosen.work or Path(folder))
        for name, sections in METHODS.items():
            steps = max(1, math.ceil(members * epochs / (BATCH * rounds * sections["clients"]["count"])))
            drawn = []
            for seed in range(chosen.seed, chosen.seed + seeds):
                config = configuration(text, sections, examples, rounds, steps, seed)
                make = functools.partial(measured, config, folder)
                kept = f"{'quick' if chosen.quick else 'full'} seed {seed} {name}"
                drawn.append(parts.of(kept, make))
            rows.append(row(name, drawn))
    head = (
        "method",
        "loss of members",
        "of others",
        "AUC by loss",
        "AUC by gain",
        "found by gain",
        "epsilon",
    )
    print(
        section(
            "Membership inference on the final adapter",
            {
                "config": "smollm2-135m, bfloat16, LoRA rank 16 on attention unless stated, cuts 2, 5, 10, "
                "15; "
                f"{epochs} epochs over the members in batches of {BATCH}, lr 2e-3, for all",
                "text": f"{'E2E (devset.csv)' if e2e else 'python-docs (embedded)'}: {members} members, "
                f"{examples - members} others of the same clients, drawn anew for each seed",
                "seed": ", ".join(map(str, range(chosen.seed, chosen.seed + seeds))),
                "spread": "mean and range over the seeds",
                "chance": f"an AUC of 0.5 has a 95 % interval of {in_words(chance(examples))} in one run "
                "(Hanley and McNeil 1982)",
                "epsilon": "of a client against readers of the adapter, at delta 1e-5, zero-out neighbours",
            },
            table(head, rows),
        )
    )


def measured(config: RunConfig, folder: str) -> dict[str, Any]:
    """Train one method with one seed and attack its adapter; return plain data."""
    with tempfile.TemporaryDirectory(dir=folder) as run_folder:
        run = splitft.train(config, Path(run_folder) / "run")
        loss, gain, known, unknown = judged(config, run, config.data.max_examples or 0)
        spent = run.summary["privacy_spent"]
    return {
        "members": known,
        "others": unknown,
        "by_loss": loss.auc,
        "by_gain": gain.auc,
        "found": gain.found,
        "epsilon": spent[-1]["epsilon"] if spent else None,
    }


def row(name: str, drawn: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a method's row of the table: means over its seeds."""

    def of(key: str) -> list[float]:
        return [run[key] for run in drawn]

    epsilon = drawn[0]["epsilon"]
    return [
        name,
        f"{statistics.mean(of('members')):.3f}",
        f"{statistics.mean(of('others')):.3f}",
        ranged(of("by_loss")),
        ranged(of("by_gain")),
        f"{100 * statistics.mean(of('found')):.0f}%",
        "-" if epsilon is None else f"{epsilon:,.0f}",
    ]


def ranged(sample: Sequence[float]) -> str:
    """Format a mean with its range."""
    return f"{statistics.mean(sample):.2f} ({min(sample):.2f} to {max(sample):.2f})"


def chance(examples: int) -> tuple[float, float]:
    """Return the 95 % interval of an attack that guesses, for as many members as others."""
    ranks = np.arange(examples // 2, dtype=np.float64)
    guessed = by_loss(ranks, ranks)
    return guessed.low, guessed.high


def configuration(
    text: Mapping[str, Any],
    sections: Mapping[str, Any],
    examples: int,
    rounds: int,
    steps: int,
    seed: int,
) -> RunConfig:
    """Return the configuration of one method's run."""
    return from_mapping({
        "model": {"dtype": "bfloat16"},
        "data": {**text, "max_examples": examples, "holdout": 0.5, "eval_examples": 2},
        "training": {"rounds": rounds, "steps": steps, "batch_size": BATCH, "lr": 2e-3},
        "seed": seed,
        **sections,
    })  # fmt: skip


def in_words(interval: tuple[float, float]) -> str:
    """Format an interval."""
    return f"{interval[0]:.2f} to {interval[1]:.2f}"


if __name__ == "__main__":
    main()
