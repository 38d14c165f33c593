"""What do fewer bytes on the wire cost in quality, when a model is trained through them?

    one client, cut k:  train through the codec's wire  -->  perplexity of what was learnt, wire exact
                                                        -->  the same, through the codec, as a split run is
                        bytes of a step, all roles and frames, by 1,000 tokens

Every wire trains on the same batches from the same start as the exact wire (fp32) of the same text and seed.
By the contract of the algorithm the exact run is the same at every cut, and is made once. But training in
bfloat16 makes the last digit of a number large: two runs that differ by that alone end apart by more than a
good codec costs. So what a wire is held against is the mean of the exact run and of runs whose hidden states
and gradients are off by a thousandth, one at each cut; how far these are apart says what differences mean.

Codecs that learn (axes, differences) pay for learning in the first steps and, ever more rarely, later: MB are
given for the whole run, and as the median of its second half's steps.

Each run is a part, kept as JSON in the work folder: a stopped benchmark goes on where it was, and runs of
different texts may be made side by side (`--texts`) and tabled together.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from drawing import savings
from measuring import REPOSITORY, Parts, begin, options, section, table
from splitft.config import from_mapping
from splitft.model.source import silence_transformers
from splitft.run.setup import prepare
from splitft.specs import WireSpec
from splitft.tracking.events import StepDone, Traffic
from splitft.training import Simulation

DATA = REPOSITORY.parent / "shared/data"
TEXTS = {
    "E2E": {"source": str(DATA / "e2e/devset.csv"), "prompt": "mr", "completion": "ref", "max_tokens": 128},
    "WikiText-2": {"source": str(DATA / "wikitext2/valid.txt"), "max_tokens": 128},
}
EMBEDDED = {"python-docs": {"source": "python-docs", "max_tokens": 128}}
"""Where the texts above are not at hand."""
RATES = {"WikiText-2": 2e-4}
"""Learning rate, where 5e-4 lets the last digit decide over percents."""
EXACT = ("fp32", "fp32")
SHAKEN = ("bounded:rel=1e-3", "bounded:rel=1e-3")
"""About as exact as bfloat16, which the model computes in, but not the same digits."""
WIRES = [
    ("int8", "int8"),
    ("int4", "int4"),
    ("principal:bits=5", "principal:bits=3"),
    ("int4", "int2"),
    ("principal:bits=3", "principal:bits=1"),
]
MORE_WIRES = [
    ("bf16", "bf16"),
    ("fp8", "fp8"),
    ("int2", "int2"),
    ("int4", "topk"),
    ("principal", "principal"),
    ("principal", "int2"),
    ("bounded:rel=0.1", "bounded:rel=0.5"),
    ("temporal", "int8"),
]
GOALS = ((4, 0.1), (8, 0.5), (16, 1.5))
"""Times fewer bytes than fp32, and the rise of perplexity allowed, in percent."""
NEARLY = 0.9
"""Share of a goal's saving from which on a wire is held against it; what it saves is said beside."""


@dataclass(frozen=True)
class Outcome:
    """One training run."""

    perplexity: float
    """Of what was learnt, through an exact wire."""
    through_codec: float
    """The same with hidden states rounded."""
    mb: float
    """MB of hidden states and gradients for 1,000 tokens, over the run."""
    last_mb: float
    """The same of a step, as the median of the run's second half: most is learnt by then."""


def outcome(
    text: dict[str, object], wire: Sequence[str], cut: int, seed: int, steps: int, rate: float
) -> Outcome:
    """Train one client through a wire, and evaluate."""
    hidden, gradient = wire
    config = from_mapping({
        "model": {"dtype": "bfloat16"},
        "data": {**text, "max_examples": 600, "holdout": 0.1, "eval_examples": 60},
        "clients": {"count": 1, "cuts": cut, "shares": {"by": "iid"}},
        "lora": {"rank_at_cut": None},
        "training": {
            "rounds": 1, "steps": steps, "batch_size": 6, "lr": rate, "schedule": "cosine", "warmup": 2,
        },
        "wire": {"hidden": hidden, "gradient": gradient, "in_process": "bytes"},
        "seed": seed,
    })  # fmt: skip
    with silence_transformers():
        prepared = prepare(config)
    events: list[object] = []
    prepared.trainer(prepared.simulation(), events.append).train(prepared.initial())
    taken = [event for event in events if isinstance(event, StepDone)]
    through = [event.loss for event in events if type(event).__name__ == "Evaluated"][-1]
    exact = replace(prepared.serializer, wire=WireSpec(hidden="fp32", gradient="fp32"))
    found = Simulation(prepared.server, prepared.clients, exact).evaluate().values()
    loss = sum(one.loss for one in found) / sum(one.tokens for one in found)
    usual = statistics.median(_mb([step]) for step in taken[len(taken) // 2 :])
    return Outcome(math.exp(loss), math.exp(through), _mb(taken), usual)


def _mb(steps: Sequence[StepDone]) -> float:
    def nbytes(traffic: Traffic) -> int:
        return sum(way.get("hidden", 0) + way.get("gradient", 0) for way in (traffic.up, traffic.down))

    return sum(nbytes(step.traffic) for step in steps) / 1e6 / sum(step.tokens for step in steps) * 1e3


@dataclass(frozen=True)
class Cell:
    """A wire on one text at one cut, over seeds, against the exact wire."""

    text: str
    cut: int
    wire: tuple[str, str]
    less: float
    """Times fewer bytes than fp32, by `last_mb`."""
    mb: float
    last_mb: float
    rises: tuple[float, ...]
    """Percent of perplexity, by seed, of what was learnt."""
    through: tuple[float, ...]
    """The same through the codec."""


def measure(
    parts: Parts, texts: dict[str, dict[str, object]], cuts: Sequence[int], wires: Sequence[tuple[str, str]],
    seeds: Sequence[int], steps: int,
) -> list[Cell]:  # fmt: skip
    """Every wire on every text at every cut."""

    def made(name: str, wire: tuple[str, str], cut: int, seed: int) -> Outcome:
        def make() -> dict[str, float]:
            return asdict(outcome(texts[name], wire, cut, seed, steps, RATES.get(name, 5e-4)))

        key = f"{name} {' '.join(wire)} cut {cut} seed {seed} steps {steps}"
        return Outcome(**parts.of(key, make))

    cells = []
    for name in texts:
        exact = {seed: made(name, EXACT, cuts[0], seed) for seed in seeds}
        alike = {s: [exact[s], *(made(name, SHAKEN, cut, s) for cut in cuts)] for s in seeds}
        base = {s: statistics.geometric_mean(one.perplexity for one in runs) for s, runs in alike.items()}
        for cut in cuts:
            for wire in [SHAKEN, *wires]:
                found = {seed: made(name, wire, cut, seed) for seed in seeds}
                mean = statistics.fmean
                last = mean(one.last_mb for one in found.values())
                cells.append(Cell(
                    name, cut, wire,
                    less=mean(one.last_mb for one in exact.values()) / last,
                    mb=mean(one.mb for one in found.values()),
                    last_mb=last,
                    rises=tuple(_percent(found[s].perplexity, base[s]) for s in seeds),
                    through=tuple(_percent(found[s].through_codec, base[s]) for s in seeds),
                ))  # fmt: skip
    return cells


def _percent(found: float, wanted: float) -> float:
    return 100 * (found / wanted - 1)


def _spread(values: Sequence[float]) -> str:
    """Mean and its standard error."""
    if len(values) < 2:
        return f"{values[0]:+.2f}"
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):+.2f} ± {error:.2f}"


def _named(wire: tuple[str, str]) -> tuple[str, str]:
    return ("last digit", "shaken") if wire == SHAKEN else wire


def verdicts(cells: Sequence[Cell]) -> dict[str, str]:
    """For each goal, the wire that saves about that much and costs a split run least, over all its runs."""
    shaken = [abs(rise) for cell in cells if cell.wire == SHAKEN for rise in cell.rises]
    found = {"runs that differ by the last digit alone": f"{statistics.fmean(shaken):.2f} % from their mean"}
    wires = list(dict.fromkeys(cell.wire for cell in cells if cell.wire != SHAKEN))
    for less, allowed in GOALS:
        costs: dict[tuple[str, str], tuple[float, float]] = {}
        said: dict[tuple[str, str], str] = {}
        for wire in wires:
            own = [cell for cell in cells if cell.wire == wire]
            saved = [cell.less for cell in own]
            if statistics.fmean(saved) < NEARLY * less:  # frames, scales and rows apart are part of the bytes
                continue
            learnt = [rise for cell in own for rise in cell.rises]
            through = [rise for cell in own for rise in cell.through]
            worst = max(statistics.fmean(cell.rises) for cell in own)
            costs[wire] = statistics.fmean(through), statistics.fmean(learnt)
            said[wire] = (
                f"{' / '.join(wire)}, {min(saved):.1f} to {max(saved):.1f} times fewer; mean of all runs "
                f"{_spread(learnt)} %, worst cell {worst:+.2f} %, through the codec {_spread(through)} %"
            )
        goal = f"goal, {less} times fewer bytes at {allowed} % of perplexity at most"
        if not costs:
            found[goal] = "missed: no wire saves that much"
            continue
        best = min(costs, key=lambda wire: costs[wire])
        found[goal] = f"perplexity {'met' if costs[best][1] <= allowed else 'missed'}: {said[best]}"
    return found


def front(cells: Sequence[Cell]) -> dict[str, tuple[float, float, float]]:
    """Of each wire: times fewer bytes; rise of perplexity, in percent, as learnt; through the codec."""
    found = {}
    for wire in dict.fromkeys(cell.wire for cell in cells if cell.wire != SHAKEN):
        own = [cell for cell in cells if cell.wire == wire]
        found[" / ".join(wire).replace(":bits=", " ")] = (
            statistics.fmean(cell.less for cell in own),
            statistics.fmean(rise for cell in own for rise in cell.rises),
            statistics.fmean(rise for cell in own for rise in cell.through),
        )
    return found


def _options() -> argparse.Namespace:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=16, help="training steps of each run")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from --seed on")
    parser.add_argument("--cuts", type=int, nargs="+", default=[2, 8, 15])
    parser.add_argument("--wires", nargs="+", help="hidden/gradient pairs, such as int4/int2")
    parser.add_argument("--all", action="store_true", help="every codec, also those far from the front")
    parser.add_argument("--texts", nargs="+", help="some of the texts: E2E, WikiText-2")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/codec-quality"), help="finished runs are kept here"
    )
    parser.add_argument("--plot", type=Path, help="write the Pareto plot there (SVG)")
    return parser.parse_args()


def main() -> None:
    chosen = _options()
    begin(chosen.seed, chosen.threads)
    texts = {name: text for name, text in TEXTS.items() if Path(str(text["source"])).is_file()} or EMBEDDED
    texts = {name: text for name, text in texts.items() if name in (chosen.texts or texts)}
    wires = WIRES + (MORE_WIRES if chosen.all else [])
    if chosen.wires:
        wires = [(hidden, gradient) for hidden, _, gradient in (one.partition("/") for one in chosen.wires)]
    cuts, steps = chosen.cuts, chosen.steps
    if chosen.quick:
        texts, cuts, steps, wires = dict([next(iter(texts.items()))]), cuts[:1], 3, wires[:2]
    seeds = range(chosen.seed, chosen.seed + (1 if chosen.quick else chosen.seeds))
    cells = measure(Parts(chosen.work), texts, cuts, wires, seeds, steps)
    if chosen.plot:
        chosen.plot.parent.mkdir(parents=True, exist_ok=True)
        title = "rise of perplexity, percent, of what was learnt (full) and through the codec (hollow); "
        savings(chosen.plot, front(cells), GOALS, title + "crosses: goals")
    rows = [
        (
            cell.text, cell.cut, *_named(cell.wire),
            f"{cell.last_mb:.2f}", f"{cell.mb:.2f}", f"{cell.less:.1f}",
            _spread(cell.rises), _spread(cell.through),
        )
        for cell in cells
    ]  # fmt: skip
    head = (
        "text", "cut", "hidden", "gradient", "MB / 1,000 labelled tokens", "whole run",
        "times fewer than fp32", "perplexity of what was learnt, %", "through the codec, %",
    )  # fmt: skip
    print(
        section(
            "Quality against bytes on the wire",
            {
                "config": f"smollm2-135m, bf16, LoRA rank 16 on attention, {steps} steps of 6 sequences, "
                "lr 5e-4 (2e-4 on WikiText-2) after 2 steps of warm-up, cosine; 60 held-out examples",
                "seeds": f"{', '.join(map(str, seeds))}; mean and its standard error",
                "pairing": "every run against the exact and nearly exact ones of its text, seed and batches",
                **verdicts(cells),
            },
            table(head, rows),
        )
    )


if __name__ == "__main__":
    main()
