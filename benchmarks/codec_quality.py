"""Measure the quality of models that are trained through each codec against the bytes sent.

    one client, cut k:  train through the codec  -->  perplexity of the adapter, without the codec
                                                 -->  the same, through the codec, as in a split run
                        bytes of a step, all roles and frames, per 1,000 tokens

Every run has the same batches and initial adapter as the exact run (fp32) of its text and seed. The exact run
is the same at every cut, and is trained once. Training in bfloat16 amplifies differences in the last digit:
two runs that differ only there end further apart than the cost of a good codec. So the reference is the mean
of the exact run and of runs with errors of a thousandth in hidden states and gradients, one at each cut;
their spread is the noise of the measurement.

Codecs that learn (axes, differences) send more in the first steps, and now and then later. MB are given for
the whole run, and as the median of the steps in its second half.

Each run is a part, kept as JSON in the work folder: a stopped benchmark can be resumed, and different texts
can be run in parallel (`--texts`) and put into one table afterwards.
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
"""If the texts above are not available."""
RATES = {"WikiText-2": 2e-4}
"""Learning rate of texts for which, at 5e-4, the last digit changes perplexity by percents."""
EXACT = ("fp32", "fp32")
SHAKEN = ("bounded:rel=1e-3", "bounded:rel=1e-3")
"""As accurate as bfloat16, in which the model computes, with other rounding errors."""
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
"""Codecs with at least this share of a goal's reduction are compared with it; theirs is printed."""


@dataclass(frozen=True)
class Outcome:
    """One training run."""

    perplexity: float
    """Of the adapter, without the codec."""
    through_codec: float
    """The same with hidden states rounded."""
    mb: float
    """MB of hidden states and gradients for 1,000 tokens, over the run."""
    last_mb: float
    """The same of a step, as the median of the run's second half: most is learnt by then."""


def outcome(
    text: dict[str, object], wire: Sequence[str], cut: int, seed: int, steps: int, rate: float
) -> Outcome:
    """Train one client through a pair of codecs, and evaluate."""
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
    """A pair of codecs on one text at one cut, over seeds, against the reference."""

    text: str
    cut: int
    wire: tuple[str, str]
    less: float
    """Times fewer bytes than fp32, by `last_mb`."""
    mb: float
    last_mb: float
    rises: tuple[float, ...]
    """Rise of perplexity in percent, by seed, without the codec."""
    through: tuple[float, ...]
    """The same through the codec."""


def measure(
    parts: Parts, texts: dict[str, dict[str, object]], cuts: Sequence[int], wires: Sequence[tuple[str, str]],
    seeds: Sequence[int], steps: int,
) -> list[Cell]:  # fmt: skip
    """Measure every pair of codecs on every text at every cut."""

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
    """Format the mean and its standard error."""
    if len(values) < 2:
        return f"{values[0]:+.2f}"
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):+.2f} ± {error:.2f}"


def _named(wire: tuple[str, str]) -> tuple[str, str]:
    return ("last digit", "only") if wire == SHAKEN else wire


def verdicts(cells: Sequence[Cell]) -> dict[str, str]:
    """Return for each goal the codecs with about that reduction and the least cost for a split run."""
    shaken = [abs(rise) for cell in cells if cell.wire == SHAKEN for rise in cell.rises]
    found = {"runs that differ in the last digit only": f"{statistics.fmean(shaken):.2f} % from their mean"}
    wires = list(dict.fromkeys(cell.wire for cell in cells if cell.wire != SHAKEN))
    for less, allowed in GOALS:
        costs: dict[tuple[str, str], tuple[float, float]] = {}
        said: dict[tuple[str, str], str] = {}
        for wire in wires:
            own = [cell for cell in cells if cell.wire == wire]
            saved = [cell.less for cell in own]
            if statistics.fmean(saved) < NEARLY * less:  # bytes include frames, scales and outlier rows
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
            found[goal] = "missed: no codec has this reduction"
            continue
        best = min(costs, key=lambda wire: costs[wire])
        found[goal] = f"perplexity {'met' if costs[best][1] <= allowed else 'missed'}: {said[best]}"
    return found


def front(cells: Sequence[Cell]) -> dict[str, tuple[float, float, float]]:
    """Return for each pair of codecs the reduction, and the rise of perplexity in percent: without,
    through."""
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
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from --seed on")
    parser.add_argument("--cuts", type=int, nargs="+", default=[2, 8, 15])
    parser.add_argument("--wires", nargs="+", help="hidden/gradient pairs, such as int4/int2")
    parser.add_argument(
        "--all", action="store_true", help="all pairs of codecs, also those far from the Pareto front"
    )
    parser.add_argument("--texts", nargs="+", help="some of the texts: E2E, WikiText-2")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/codec-quality"), help="folder of finished runs"
    )
    parser.add_argument("--plot", type=Path, help="write the Pareto plot to this SVG file")
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
        title = "rise of perplexity, percent, without the codec (full) and through it (hollow); "
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
        "times fewer than fp32", "rise of perplexity, %", "through the codec, %",
    )  # fmt: skip
    print(
        section(
            "Quality against bytes on the wire",
            {
                "config": f"smollm2-135m, bf16, LoRA rank 16 on attention, {steps} steps of 6 sequences, "
                "lr 5e-4 (2e-4 on WikiText-2) after 2 steps of warm-up, cosine; 60 held-out examples",
                "seeds": f"{', '.join(map(str, seeds))}; mean and its standard error",
                "reference": "the exact and nearly exact runs of the same text, seed and batches",
                **verdicts(cells),
            },
            table(head, rows),
        )
    )


if __name__ == "__main__":
    main()
