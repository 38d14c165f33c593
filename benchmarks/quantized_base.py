"""Measure what quantized frozen weights cost in perplexity and seconds, and save in memory.

    perplexity   the whole model on text in windows, token by token, against the full weights
    held         bytes of frozen weights: a client at cut 2 with embedding and head, and the whole model
    peak         a client's first training step at cut 2, in a process of its own, as in `client_memory`
    step         forward and backward pass of all blocks with LoRA, the variants in turns
    training     a small federation on each base: held-out loss before and after

The spread of a difference in loss is its standard error over windows, which all variants share.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import splitft
from client_memory import client_step, status
from measuring import REPOSITORY, Spread, begin, interleaved, options, ratio, section, table
from splitft.adapters import attach
from splitft.config import from_mapping
from splitft.data.corpora import read_records
from splitft.data.tokens import tokenise
from splitft.geometry import Span
from splitft.model import Model, Segment, open_model, token_losses
from splitft.specs import DataSpec, LoraSpec, ModelSpec
from splitft.training.ranks import RankPolicy

VARIANTS: dict[str, dict[str, str]] = {
    "full": {},
    "int8": {"quantize": "int8"},
    "nf4": {"quantize": "nf4"},
    "full, rows in int8": {"embedding": "int8"},
    "nf4, rows in int8": {"quantize": "nf4", "embedding": "int8"},
}
DATA = REPOSITORY.parent / "shared/data"
TEXTS = {
    "Python's documentation": DataSpec(),
    "WikiText-2, validation": DataSpec(source=str(DATA / "wikitext2/valid.txt")),
    "GSM8K": DataSpec(source=str(DATA / "gsm8k/train.jsonl"), prompt="question", completion="answer"),
}
"""Texts whose file is missing are left out."""
CUT, SEQUENCES, TOKENS, WINDOW = 2, 4, 128, 256


def opened(name: str, variant: str, dtype: str = "auto") -> Model:
    """Return the model as this variant holds it."""
    return open_model(ModelSpec(name=name, dtype=dtype, **VARIANTS[variant]))


def whole(model: Model) -> Segment:
    """Return all of the model in one segment."""
    return model.segment(Span(0, model.shape.blocks), embedding=True, head=True)


def windows(model: Model, spec: DataSpec, count: int, seed: int) -> torch.Tensor:
    """Return windows of consecutive tokens (count, WINDOW) of a text, drawn by the seed."""
    text = tokenise(read_records(spec, None, seed), model.tokenizer(), WINDOW, spec.separator)
    tokens = torch.tensor([token for example in text.examples for token in example.tokens])
    every = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    chosen = torch.randperm(len(every), generator=torch.manual_seed(seed))[:count]
    return every[chosen]


@torch.no_grad()
def losses(model: Model, text: torch.Tensor) -> list[float]:
    """Return the mean loss of a token in each window."""
    segment, found = whole(model), []
    for part in text.split(SEQUENCES):
        hidden = segment.run(part)[:, :-1].flatten(0, 1)
        found.append(token_losses(segment, hidden, part[:, 1:].flatten()).view(len(part), -1).mean(1))
    return torch.cat(found).tolist()


def perplexities(name: str, variants: Sequence[str], count: int, seed: int) -> str:
    """Return the table of perplexities by text and variant."""
    rows = []
    for title, spec in list(TEXTS.items())[: len(variants) - 1]:
        if spec.source_name is None and not Path(spec.source).is_file():
            continue
        text = windows(opened(name, "full"), spec, count, seed)
        found = {variant: losses(opened(name, variant), text) for variant in variants}
        for variant, own in found.items():
            worse = [a - b for a, b in zip(own, found["full"], strict=True)]
            error = statistics.stdev(worse) / math.sqrt(len(worse)) if len(worse) > 1 else 0.0
            perplexity, full = (math.exp(statistics.mean(one)) for one in (own, found["full"]))
            more = f"{statistics.mean(worse):+.4f} ± {error:.4f}"
            rows.append((title, variant, f"{perplexity:.3f}", f"{perplexity / full - 1:+.1%}", more))
    return table(("text", "base", "perplexity", "to full", "loss, nats a token"), rows)


def held_bytes(segment: Segment) -> int:
    """Return the bytes of the frozen weights that a segment holds."""
    places = (place for part in (*segment._shared, *segment._frozen) for place in part.places.values())
    return sum(
        {id(one): one.nbytes for one in (getattr(*place) for place in places) if not one.is_meta}.values()
    )


def step_of(model: Model, seed: int) -> Callable[[], None]:
    """Return a training step of all blocks, without head and optimizer."""
    segment, ranks = whole(model), RankPolicy(LoraSpec(), model.shape.blocks, "svd", seed)
    bank = attach(segment.blocks, ranks.lora.targets, ranks.scale, model.dtype)
    bank.put("own", ranks.start(bank.sizes, torch.float32))
    tokens = torch.randint(model.shape.vocab, (SEQUENCES, TOKENS), generator=torch.manual_seed(seed))

    def step() -> None:
        with bank.routed([("own", SEQUENCES)]):
            hidden = segment.run(tokens)
        hidden.backward(torch.full_like(hidden, 1e-3))

    return step


def measure_peak(name: str, variant: str, seed: int) -> float:
    """Return the peak MiB of a client's first step in this process, above its memory after importing."""
    import peft  # noqa: F401  # imports bitsandbytes too

    begin(seed, None)
    model = opened(name, variant)
    model.held_skeleton()
    torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    before = status("VmRSS")
    client_step(model, CUT, "client", seed)
    return status("VmHWM") - before


def _peak(name: str, variant: str, seed: int) -> float:
    command = [sys.executable, __file__, "--seed", str(seed), "--model", name, "--peak", variant]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def training(name: str, variant: str, rounds: int, seed: int) -> list[float]:
    """Return the held-out losses of a small federation, before training and after each round."""
    config = from_mapping(
        {
            "model": {"name": name, **VARIANTS[variant]},
            "clients": {"count": 4, "cuts": [2, 5, 10, 15]},
            "training": {"rounds": rounds, "steps": 10},
            "seed": seed,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        run = splitft.train(config, Path(folder) / "run")
        found: list[float] = run.summary["eval_loss"]
        return found


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--peak", choices=VARIANTS, help="measure one peak in this process, as JSON")
    parser.add_argument("--windows", type=int, default=64, help="windows of 256 tokens of each text")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of training; 0 for none")
    chosen = parser.parse_args()
    name, seed, quick = chosen.model, chosen.seed, chosen.quick
    if chosen.peak:
        print(json.dumps(measure_peak(name, chosen.peak, seed)))
        return
    begin(seed, chosen.threads)
    variants = ["full", "nf4"] if quick else list(VARIANTS)
    full = opened(name, "full")
    kept = {
        variant: whole(opened(name, variant)) for variant in variants
    }  # all later segments share the bytes
    steps = {variant: step_of(opened(name, variant), seed) for variant in variants}
    seconds = interleaved(steps, 2 if quick else 12)
    rows = []
    for variant in variants:
        model = opened(name, variant)
        client = held_bytes(model.segment(Span(0, CUT), embedding=True, head=True))
        peaks = [_peak(name, variant, seed) for _ in range(1 if quick else 3)]
        rows.append(
            (
                variant,
                f"{client / 2**20:.1f} MiB",
                f"{held_bytes(kept[variant]) / 2**20:.1f} MiB",
                f"{Spread.of(peaks).median:.0f} MiB",
                f"{Spread.of(seconds[variant]).median:.3f}",
                ratio(seconds[variant], seconds["full"]),
            )
        )
    parts = [
        perplexities(name, variants, 4 if quick else chosen.windows, seed),
        table(("base", f"held, cut {CUT}", "held, whole", f"peak, cut {CUT}", "step, s", "to full"), rows),
    ]
    if chosen.rounds and not quick:
        curves = {variant: training(name, variant, chosen.rounds, seed) for variant in variants}
        parts.append(
            table(
                ("base", "loss before", "loss after", "gained"),
                [(v, f"{c[0]:.4f}", f"{c[-1]:.4f}", f"{c[0] - c[-1]:.4f}") for v, c in curves.items()],
            )
        )
    facts = {
        "config": f"{name}, {full.spec.dtype}, {chosen.windows} windows of {WINDOW} tokens; steps of "
        f"{SEQUENCES} x {TOKENS} tokens, LoRA of the defaults; training with the defaults, 4 clients, cuts "
        f"2 to 15, {chosen.rounds} rounds of 10 steps",
        "seed": seed,
        "spread": "losses: standard error of the difference over windows; ratios: median (middle half)",
    }
    print(section("Quantized bases", facts, *parts))


if __name__ == "__main__":
    main()
