"""What does each defence cost, in perplexity and in time?

The same small federation (E2E meaning representations and sentences, four clients) is trained with one
defence at a time. Perplexity is that of all clients' held-out text, with the defence in place, as clients
evaluate it; seconds are those of a step's legs. How much each defence hides is another question, asked by the
attacks (`splitft audit`); how much it promises stands in its row. The goal, which needs both figures: at most
5 % more perplexity for a defence that brings the attacks under 30 %.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import splitft
from measuring import REPOSITORY, begin, options, section, table
from splitft.assemble import Run
from splitft.config import from_mapping
from splitft.privacy.accounting import row_epsilon
from splitft.wire import CODECS

WIDTH = 576
"""D of the demo's model."""
DELTA = 1e-5

Sections = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Setting:
    """One defence, and the row that it is compared with."""

    name: str
    sections: Sections
    promise: str = "nothing"
    """What its noise promises, in a few words."""
    against: str = "none"
    """The row that shows the same run without it."""


def hidden(defence: str, noise: float) -> Setting:
    """Noise on hidden states."""
    epsilon = row_epsilon(defence, noise, WIDTH, DELTA)
    kind = "gaussian" if defence == "gaussian" else "laplace"
    return Setting(
        f"hidden: {kind} {noise:g}",
        {"privacy": {"hidden": {"defence": defence, "noise": noise}}},
        f"epsilon {epsilon:,.0f} for one row",
    )


def settings() -> list[Setting]:
    """All of them; the first is the run without a defence."""
    clip = {"privacy": {"hidden": {"defence": "clip"}}}
    gradient = {"privacy": {"gradient": {"defence": "gaussian", "noise": 1.0}}}
    small = {"lora": {"rank": 1, "rank_at_cut": None}, "aggregate": {"rule": "zero-pad"}}
    bound = {**small, "privacy": {"updates": {"clip_norm": 0.1}}}
    noisy = {**small, "privacy": {"updates": {"clip_norm": 0.1, "noise_multiplier": 1.0}}}
    return [
        Setting("none", {}),
        Setting("hidden: clip", clip),
        hidden("gaussian", 0.1),
        hidden("gaussian", 0.3),
        hidden("gaussian", 1.0),
        hidden("laplace", 0.3),
        Setting(
            "gradient: gaussian 1",
            gradient,
            f"epsilon {row_epsilon('gaussian', 1.0, WIDTH, DELTA):,.0f} for one label",
        ),
        *(
            Setting(f"codec {name}", {"wire": {"hidden": name}})
            for name in ("int8", "int4")
            if name in CODECS
        ),
        Setting("cut 15 instead of 2", {"clients": {"cuts": 15}}),
        Setting("first 2 blocks private", {"privacy": {"private_blocks": 2}}),
        Setting("none, rank 1", small),
        Setting("updates: clip 0.1, rank 1", bound, against="none, rank 1"),
        Setting("updates: and noise 1", noisy, "see epsilon", against="none, rank 1"),
    ]


def trained(setting: Setting, base: Sections, seed: int, out: Path) -> Run:
    """The run with this defence."""
    sections: dict[str, dict[str, Any]] = {name: dict(values) for name, values in base.items()}
    for name, values in setting.sections.items():
        sections[name] = {**sections.get(name, {}), **values}
    return splitft.train(from_mapping({**sections, "seed": seed}), out)


def row(setting: Setting, summary: Mapping[str, Any], against: Mapping[str, Any]) -> Sequence[object]:
    """Perplexity and time, and both against the run without."""
    before, after = (math.exp(min(50.0, summary["eval_loss"][index])) for index in (0, -1))
    without = math.exp(against["eval_loss"][-1])
    seconds, usual = (sum(one["seconds_by_leg"].values()) / one["steps"] for one in (summary, against))
    spent = summary["privacy_spent"] or [{"epsilon": None}]
    epsilon = spent[-1]["epsilon"]
    promise = setting.promise if epsilon is None else f"epsilon {epsilon:,.0f} for a client"
    return (
        setting.name,
        f"{before:.2f}",
        f"{after:.2f}",
        f"{100 * (after / without - 1):+.1f} %",
        f"{seconds:.3f}",
        f"{seconds / usual:.2f}",
        promise,
    )


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared/data/e2e/devset.csv")
    chosen = parser.parse_args()
    begin(chosen.seed, chosen.threads)
    e2e = chosen.data.is_file()
    text = {"source": str(chosen.data), "prompt": "mr", "completion": "ref"} if e2e else {"max_tokens": 96}
    steps = 1 if chosen.quick else 3
    examples = 160
    base: dict[str, dict[str, Any]] = {
        "data": {**text, "max_examples": examples, "holdout": 0.2, "eval_examples": 2 if chosen.quick else 8},
        "clients": {"count": 4, "cuts": 2, "shares": {"by": "iid"}},
        "training": {"rounds": 2, "steps": steps, "batch_size": 4, "lr": 2e-3},
    }
    summaries: dict[str, Mapping[str, Any]] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for setting in settings():
            run = trained(
                setting, base, chosen.seed, Path(folder) / setting.name.replace(" ", "-").replace(":", "")
            )
            summaries[setting.name] = run.summary
            rows.append(row(setting, run.summary, summaries[setting.against]))
    print(
        section(
            "Cost of each defence",
            {
                "config": "smollm2-135m, bfloat16, 4 clients at cut 2, LoRA rank 16 (8 at the cut), "
                f"2 rounds of {steps} steps of 4 sequences, lr 2e-3; one change a row",
                "text": f"{'E2E' if e2e else 'python-docs (embedded)'}, {examples} examples, iid",
                "seed": f"{chosen.seed}; one run a row",
                "noise": "deviation on a coordinate over clip_norm / sqrt(D); clip_norm is the public median",
                "epsilon": f"at delta {DELTA:g}",
            },
            table(
                (
                    "defence",
                    "perplexity before",
                    "after",
                    "to the run without",
                    "seconds a step",
                    "to the run without",
                    "promise",
                ),
                rows,
            ),
        )
    )


if __name__ == "__main__":
    main()
