"""Does the final adapter give away who was in the training text?

Every method trains on half of a small corpus, long enough to overfit, so that there is something to find; the
other half is held out by the same clients. Two attacks score every text: the loss under the adapter, and how
much lower it is than under the base model. The AUC has a 95 % interval; "found" is the share of members found
at one false alarm in twenty. Methods are configurations: one client for centralized, one rank everywhere for
fedlora (a cut only says where blocks run, so it trains what fedlora trains), and splitft with its own cuts.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import splitft
from measuring import REPOSITORY, begin, options, section, table
from splitft.assemble.sharing import divide_text
from splitft.config import RunConfig, from_mapping
from splitft.data.text import Example, held_out
from splitft.export import with_adapter
from splitft.model import open_model
from splitft.privacy.membership import Membership, by_gain, by_loss, losses

MANY = {"clients": {"count": 4, "cuts": [2, 5, 10, 15], "shares": {"by": "iid"}}}
SMALL = {"lora": {"rank": 1, "rank_at_cut": None}, "aggregate": {"rule": "zero-pad"}}
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
"""Each method as what it adds to the configuration."""


def parties(config: RunConfig) -> tuple[list[Example], list[Example]]:
    """Members and others: what the run's clients train on, and what they hold out."""
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
    """Both attacks on a finished run, and the mean losses of members and others."""
    model = open_model(config.model)
    members, others = (sample(texts, most, config.seed) for texts in parties(config))
    whole = with_adapter(run.adapter_dir, model.path, model.dtype)
    known, unknown = losses(whole, members), losses(whole, others)
    with whole.disable_adapter():
        base_known, base_unknown = losses(whole, members), losses(whole, others)
    gain = by_gain(known, unknown, base_known, base_unknown)
    return by_loss(known, unknown), gain, float(known.mean()), float(unknown.mean())


def sample(texts: Sequence[Example], most: int, seed: int) -> list[Example]:
    """At most so many of them, at random."""
    if len(texts) <= most:
        return list(texts)
    drawn = np.random.default_rng(seed).choice(len(texts), most, replace=False)
    return [texts[index] for index in np.sort(drawn)]


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared/data/e2e/devset.csv")
    chosen = parser.parse_args()
    begin(chosen.seed, chosen.threads)
    e2e = chosen.data.is_file()
    text = {"source": str(chosen.data), "prompt": "mr", "completion": "ref"} if e2e else {"max_tokens": 64}
    examples, epochs, batch = (16, 1, 4) if chosen.quick else (96, 5, 4)
    members = examples // 2
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, sections) in enumerate(METHODS.items()):
            clients = sections["clients"]["count"]
            rounds = 1 if chosen.quick else 3
            steps = max(1, math.ceil(members * epochs / (batch * rounds * clients)))
            config = configuration(text, sections, examples, rounds, steps, batch, chosen.seed)
            run = splitft.train(config, Path(folder) / str(number))
            loss, gain, known, unknown = judged(config, run, members)
            spent = run.summary["privacy_spent"]
            epsilon = spent[-1]["epsilon"] if spent else None
            rows.append((
                name, f"{known:.3f}", f"{unknown:.3f}", told(loss), told(gain),
                f"{100 * gain.found:.0f} %", "-" if epsilon is None else f"{epsilon:,.0f}",
            ))  # fmt: skip
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
                "config": "smollm2-135m, bfloat16, LoRA rank 16 on attention unless said, cuts 2, 5, 10, 15; "
                f"{epochs} epochs over {members} texts in batches of {batch}, lr 2e-3, for all",
                "text": f"{'E2E (devset.csv)' if e2e else 'python-docs (embedded)'}: "
                f"{members} members, {examples - members} others of the same clients",
                "seed": chosen.seed,
                "spread": "95 % interval of the AUC (Hanley and McNeil 1982); one run a method",
                "epsilon": "at delta 1e-5, zero-out neighbours, of a client against who gets the adapter",
            },
            table(head, rows),
        )
    )


def configuration(
    text: Mapping[str, Any],
    sections: Mapping[str, Any],
    examples: int,
    rounds: int,
    steps: int,
    batch: int,
    seed: int,
) -> RunConfig:
    """One method's run."""
    return from_mapping({
        "data": {**text, "max_examples": examples, "holdout": 0.5, "eval_examples": 2},
        "training": {"rounds": rounds, "steps": steps, "batch_size": batch, "lr": 2e-3},
        "seed": seed,
        **sections,
    })  # fmt: skip


def told(found: Membership) -> str:
    """An AUC with its interval."""
    return f"{found.auc:.2f} ({found.low:.2f} to {found.high:.2f})"


if __name__ == "__main__":
    main()
