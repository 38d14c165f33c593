"""Compare partitions of the text by length with partitions by class.

    all examples --by length | by class, Dir(alpha)--> four clients --fedlora | splitft--> adapter
                                                                       the same test text for all --> loss

SplitFT partitions text by length, other work mostly by class. Both draw Dirichlet proportions, so equal
alphas can be compared. Heterogeneity is the mean Jensen-Shannon distance between clients, of their lengths
and of their classes. E2E has no class column: a class here is the kind of food and the area in the meaning
representation (three values each with `none`, so nine classes; there are eight classes of length).

A run's held-out text depends on the partition, so the loss is measured on the same test text for all:
examples whose meaning representation occurs in no run's text.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from measuring import REPOSITORY, begin, options, section, table
from splitft.config import RunConfig, from_mapping
from splitft.data.corpora import read_records
from splitft.data.share_statistics import ShareSummary
from splitft.evaluation.evaluate import EvaluationRequest, evaluate
from splitft.run.inputs import shares
from splitft.run.train import train
from splitft.specs import DataSpec

ALPHAS = (0.1, 0.5, 10.0)
DIVISIONS = ("length", "label")
METHODS: Mapping[str, Mapping[str, Any]] = {
    "fedlora": {"lora": {"rank_at_cut": None}, "aggregate": {"rule": "factors"}},
    "splitft": {"lora": {"rank_at_cut": 4}, "aggregate": {"rule": "svd"}},
}
"""The cut does not change the result (tests/laws/test_cut_invariance.py), so fedlora is FedAvg of the factors
at one rank, with the same cuts."""
TEST, TEST_SEED = 48, 0
"""Test examples and the seed that draws them, the same for every seed of a run."""


@dataclass(frozen=True)
class Kind:
    """A partition of the text."""

    division: str
    """`length` or `label`."""
    alpha: float


@dataclass(frozen=True)
class Text:
    """The files of the examples."""

    pool: Path
    test: Path
    columns: Mapping[str, Any]
    what: str
    """Name of the text, and the meaning of a class."""


def e2e(path: Path, folder: Path) -> Text:
    """Return E2E's pairs with their class; test examples share no meaning representation."""
    records = read_records(DataSpec(source=str(path), prompt="mr", completion="ref"))
    rows = [
        {
            "mr": record.prompt,
            "ref": record.text,
            "class": f"{_slot(record, 'food')}, {_slot(record, 'area')}",
        }
        for record in records
    ]
    columns = {"prompt": "mr", "completion": "ref", "separator": " => "}
    return _written(rows, "mr", columns, folder, f"E2E ({path.name}); class: food and area")


def python_docs(folder: Path) -> Text:
    """Return the embedded text; a class is its topic."""
    records = read_records(DataSpec(), "topic")
    rows = [{"text": record.text, "class": record.label} for record in records]
    return _written(rows, "text", {"text": "text"}, folder, "python-docs (embedded); class: topic")


def _slot(record: Any, name: str) -> str:
    found = re.search(rf"{name}\[([^\]]*)\]", record.prompt)
    return found.group(1) if found else "none"


def _written(
    rows: Sequence[Mapping[str, Any]], key: str, columns: Mapping[str, Any], folder: Path, what: str
) -> Text:
    """Write pool and test files; no key of a test row is in the pool."""
    keys = sorted({row[key] for row in rows})
    order = np.random.default_rng(TEST_SEED).permutation(len(keys))
    chosen: set[str] = set()
    test: list[Mapping[str, Any]] = []
    for place in order:
        if len(test) >= TEST:
            break
        chosen.add(keys[place])
        test.append(next(row for row in rows if row[key] == keys[place]))
    pool = [row for row in rows if row[key] not in chosen]
    for name, part in (("pool", pool), ("test", test)):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return Text(folder / "pool.jsonl", folder / "test.jsonl", columns, what)


def config_of(text: Text, kind: Kind, method: str, seed: int, quick: bool) -> RunConfig:
    """Return the configuration of one run: four clients at one cut."""
    division = {"by": kind.division, "column": "class", "alpha": kind.alpha, "classes": 8}
    sample = {"max_tokens": 96, "max_examples": 1000, "eval_examples": 1}
    changes = METHODS[method]
    return from_mapping({
        "model": {"dtype": "bfloat16"},
        "data": {"source": str(text.pool), **text.columns, **sample},
        "clients": {"count": 4, "cuts": 5, "shares": division},
        "lora": {"rank": 8, "alpha": 16, **changes["lora"]},
        "aggregate": changes["aggregate"],
        "training": {"rounds": 1 if quick else 2, "steps": 1 if quick else 3, "batch_size": 2, "lr": 1e-3},
        "wire": {"in_process": "direct"},
        "seed": seed,
    })  # fmt: skip


@dataclass(frozen=True)
class Found:
    """Results of one partition, for each seed."""

    summaries: tuple[ShareSummary, ...]
    losses: Mapping[str, tuple[float, ...]]
    """Loss on the test text, by method."""


def measure(text: Text, kind: Kind, seeds: range, quick: bool, folder: Path) -> Found:
    """Partition, train and test for each seed and method."""
    summaries = [shares(config_of(text, kind, "splitft", seed, quick)).summary for seed in seeds]
    losses: dict[str, list[float]] = {method: [] for method in METHODS}
    trial = EvaluationRequest(("perplexity",), str(text.test))
    for seed in seeds:
        for method in METHODS:
            out = folder / f"{kind.division}-{kind.alpha}-{method}-{seed}"
            run = train(config_of(text, kind, method, seed, quick), out)
            losses[method].append(evaluate(run.folder, trial)[0]["metrics"]["loss"])
    return Found(tuple(summaries), {method: tuple(found) for method, found in losses.items()})


HEAD = (
    "by", "alpha", "JS of lengths", "by chance", "JS of classes", "fewest / most tokens",
    "fedlora, test loss", "splitft, test loss", "splitft - fedlora",
)  # fmt: skip


def row(kind: Kind, found: Found) -> tuple[str, ...]:
    """Return a row of the table."""
    summaries = found.summaries
    return (
        "length" if kind.division == "length" else "class",
        f"{kind.alpha:g}",
        spread([one.length_distance for one in summaries]),
        f"{statistics.fmean([one.chance_distance for one in summaries]):.3f}",
        spread([one.label_distance or 0.0 for one in summaries]),
        f"{statistics.fmean([min(one.tokens) / max(one.tokens) for one in summaries]):.2f}",
        *(spread(found.losses[method]) for method in METHODS),
        spread(differences(found.losses["splitft"], found.losses["fedlora"])),
    )


def spread(values: Sequence[float]) -> str:
    """Format the mean over seeds and the sample's standard deviation."""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def differences(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Return the differences, paired by seed."""
    return [a - b for a, b in zip(one, other, strict=True)]


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared/data/e2e/devset.csv")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from --seed on")
    chosen = parser.parse_args()
    begin(chosen.seed, chosen.threads)
    seeds = range(chosen.seed, chosen.seed + (1 if chosen.quick else chosen.seeds))
    alphas = ALPHAS[:1] if chosen.quick else ALPHAS
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        text = e2e(chosen.data, base) if chosen.data.is_file() else python_docs(base)
        found = {
            kind: measure(text, kind, seeds, chosen.quick, base)
            for kind in (Kind(division, alpha) for division in DIVISIONS for alpha in alphas)
        }
        training = config_of(text, next(iter(found)), "splitft", chosen.seed, chosen.quick).training
    by_length = {
        f"{method}, alpha {alpha:g}": spread(
            differences(
                found[Kind("length", alpha)].losses[method], found[Kind("label", alpha)].losses[method]
            )
        )
        for alpha in alphas
        for method in METHODS
    }
    facts = {
        "config": "smollm2-135m, bfloat16, 4 clients, cut 5, LoRA rank 8 on attention (splitft: 4 at the "
        f"cut, svd; fedlora: factors), {training.rounds} rounds of {training.steps} steps, batch "
        f"{training.batch_size}, lr {training.lr:g}",
        "text": f"{text.what}; 1000 examples drawn by the seed; {TEST} test examples, the same for all runs",
        "seeds": f"{seeds.start} to {seeds.stop - 1}; ± is the standard deviation over them",
        "test loss by length minus by class, paired by seed": "; ".join(
            f"{name}: {value}" for name, value in by_length.items()
        ),
    }
    print(section("Partitions of text", facts, table(HEAD, [row(*item) for item in found.items()])))


if __name__ == "__main__":
    main()
