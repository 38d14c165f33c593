"""Measure training on one CUDA GPU; without one it says so and ends.

    losses       those of the CPU: float32 within 1e-4, bfloat16 within 1 %
    step         split at cut 2, client and server on the card, against transformers + peft on the same card
    server       tokens a second with 1, 8, 32 and 64 clients at once; share of the card's peak in bfloat16
    quantized    a split step on 4-bit and on 8-bit blocks, and the card's memory

Models of 1.1 and 8 billion parameters have random weights; losses are those of SmolLM2-135M. Messages pass
through the CPU, encoded, as in a run. The frozen base needs no gradients of weights, so a step has 4
operations for each parameter and token: forward, and gradients of the inputs. The peak is that of the largest
of a few products of square matrices in bfloat16, measured here; the card's data sheet says more.
Goals: a split step at most 1.1 times peft's. `--device cpu --quick` tries the script on any machine.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import splitft
from client_memory import stream_of_random_text
from measuring import Spread, begin, interleaved, options, ratio, section, table
from random_checkpoint import LLAMA_1B, LLAMA_8B, SMALL, random_checkpoint
from server_batching import CUT, activations, gradient, server_for, step
from splitft.config import from_mapping
from splitft.errors import SplitftError
from splitft.model import Model, open_model
from splitft.model.devices import synchronize, take_devices
from splitft.specs import DevicesSpec, ModelSpec
from step_overhead import LORA, PLAIN, plain_step, split_steps

MODELS: Mapping[str, Mapping[str, Any]] = {"1.1B": LLAMA_1B, "8B": LLAMA_8B}
CLIENTS = (1, 8, 32, 64)
BATCH = (1, 128)
"""Sequences of one client, and their tokens."""
WITHIN = {"float32": 1e-4, "bfloat16": 0.01}
"""Largest relative difference of a loss from the CPU's."""
GOAL = 1.1
"""Seconds of a split step over those of peft's."""
BEST = "+ no mask"
PARTS = ("losses", "step", "server", "quantized")


def losses(device: str, seed: int, steps: int) -> tuple[str, dict[str, str]]:
    """Train the same run on the CPU and on the card; return the table of held-out losses."""
    rows, goals = [], {}
    for dtype, most in WITHIN.items():
        on_cpu, on_card = (_losses_on(one, dtype, seed, steps) for one in ("cpu", device))
        apart = max(abs(card / cpu - 1) for cpu, card in zip(on_cpu, on_card, strict=True))
        rows.append(
            (dtype, *(" ".join(f"{x:.5f}" for x in one) for one in (on_cpu, on_card)), f"{apart:.1e}")
        )
        goals[f"goal, losses in {dtype} within {most:g}"] = _verdict(apart, most, "{:.1e}")
    return table(("type", "losses on the CPU", f"on {device}", "largest relative difference"), rows), goals


def _losses_on(device: str, dtype: str, seed: int, steps: int) -> list[float]:
    """Return the held-out losses of a run with two clients, before training and after each round."""
    config = from_mapping({
        "model": {"dtype": dtype},
        "devices": {"server": device, "clients": device},
        "data": {"max_tokens": 64, "eval_examples": 4, "max_examples": 200},
        "clients": {"count": 2, "cuts": [2, 10]},
        "training": {"rounds": 2, "steps": steps, "batch_size": 4},
        "wire": {"hidden": "fp32", "gradient": "fp32"} if dtype == "float32" else {},
        "seed": seed,
    })  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        return list(splitft.train(config, Path(folder) / "run").summary["eval_loss"])


def steps_of(model: Model, device: torch.device, rounds: int, seed: int) -> dict[str, list[float]]:
    """Return seconds of peft's steps and of the split step, in turns on the same card."""
    stream = stream_of_random_text(model, seed)
    trains: dict[str, Callable[[], float]] = {
        f"peft, {name}": plain_step(model, stream, PLAIN[name], device) for name in ("plain", BEST)
    }
    trains |= split_steps(model, stream, seed, (CUT,), device)
    return interleaved({name: _finished(run, device) for name, run in trains.items()}, rounds, warmup=3)


def _finished(run: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """Return a function that waits until the card has done what `run` ordered."""

    def whole() -> None:
        run()
        synchronize([device])

    return whole


def server_rate(model: Model, clients: int, device: torch.device, rounds: int, seed: int) -> float:
    """Return the tokens a second of the server's blocks with so many clients at once."""
    names = [f"client-{number:02d}" for number in range(clients)]
    server = server_for(model, names, seed, device)
    messages = [activations(name, *BATCH, model) for name in names]
    gradients = [gradient(message, model) for message in messages]
    run = _finished(lambda: step(server, messages, gradients), device)
    spent = interleaved({"server": run}, rounds, warmup=2)["server"]
    return clients * BATCH[0] * BATCH[1] / Spread.of(spent).median


def peak_flops(device: torch.device, width: int) -> float:
    """Return the operations a second of products of square matrices in bfloat16, the fastest of several."""
    one = torch.randn(width, width, dtype=torch.bfloat16, device=device)
    least = float("inf")
    for _ in range(8):
        synchronize([device])
        began = time.perf_counter()
        one @ one
        synchronize([device])
        least = min(least, time.perf_counter() - began)
    return 2 * width**3 / least


def of_step(
    models: Mapping[str, Path], device: torch.device, rounds: int, seed: int
) -> tuple[str, dict[str, str]]:
    """Return the table of steps of each model, and how the goal was met."""
    rows, goals = [], {}
    for name, folder in models.items():
        spent = steps_of(open_model(ModelSpec(name=str(folder), dtype="bfloat16")), device, rounds, seed)
        free(device)
        for what, one in spent.items():
            against = (ratio(one, spent[f"peft, {base}"]) for base in ("plain", BEST))
            rows.append((name, what, Spread.of(one), *against))
        found = ratio(spent[f"split, cut {CUT}"], spent["peft, plain"]).median
        goals[f"goal, {name}, a split step at most {GOAL} times peft's"] = _verdict(found, GOAL, "{:.3f}")
    head = ("model", "step", "seconds", "to peft, plain", "to peft with labelled logits and no mask")
    return table(head, rows), goals


def of_server(
    models: Mapping[str, Path], device: torch.device, rounds: int, chosen: argparse.Namespace
) -> tuple[str, dict[str, str]]:
    """Return the table of the server's tokens a second, and the measured peak."""
    peak, rows = peak_flops(device, 512 if chosen.quick else 8192), []
    counts = CLIENTS[:2] if chosen.quick else CLIENTS
    for name, folder in models.items():
        model = open_model(ModelSpec(name=str(folder), dtype="bfloat16"))
        blocks = model.skeleton().model.layers
        parameters = sum(
            parameter.numel() for block in list(blocks)[CUT:] for parameter in block.parameters()
        )
        rates = []
        for count in counts:
            try:
                rates.append(server_rate(model, count, device, rounds, chosen.seed))
            except torch.OutOfMemoryError:
                rates.append(float("nan"))
            free(device)
        rows.append((name, "tokens a second", *(_cell(f"{rate:.0f}") for rate in rates)))
        rows.append((name, "to one client", *(_cell(f"{rate / rates[0]:.2f}") for rate in rates)))
        shares = (4 * parameters * rate / peak for rate in rates)
        rows.append((name, "share of the peak", *(_cell(f"{share:.2f}") for share in shares)))
    head = ("model", f"{BATCH[0]} x {BATCH[1]} tokens a client", *(f"{count} at once" for count in counts))
    return table(head, rows), {"peak in bfloat16, measured": f"{peak / 1e12:.1f} TFLOP/s"}


def of_quantized(
    models: Mapping[str, Path], device: torch.device, rounds: int, seed: int
) -> tuple[str, dict[str, str]]:
    """Return the table of split steps on quantized bases, with the card's peak memory."""
    rows = []
    for name, folder in models.items():
        for quantize in ("none", "nf4", "int8"):
            spec = ModelSpec.model_validate({"name": str(folder), "dtype": "bfloat16", "quantize": quantize})
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            model = open_model(spec, [device])
            steps = split_steps(model, stream_of_random_text(model, seed), seed, (CUT,), device)
            run = _finished(steps[f"split, cut {CUT}"], device)
            spent = interleaved({"split": run}, rounds, warmup=2)["split"]
            used = f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f}" if device.type == "cuda" else "-"
            rows.append((name, quantize, Spread.of(spent), used))
            del run, steps, model
            free(device)
    return table(("model", "blocks", "seconds of a split step", "GB of the card at the peak"), rows), {}


def free(device: torch.device) -> None:
    """Give back the memory of models that are gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _cell(number: str) -> str:
    return "out of memory" if number == "nan" else number


def _verdict(found: float, most: float, form: str) -> str:
    return f"{form.format(found)}, {'met' if found <= most else 'missed'}"


def the_device(name: str) -> torch.device:
    """Return the card; end with what is missing if there is none."""
    try:
        return take_devices(DevicesSpec.everywhere(name)).server[0]
    except SplitftError as error:
        raise SystemExit(
            f"benchmarks/gpu.py measures a CUDA GPU, and torch {torch.__version__} finds none here: {error}. "
            "Run it on a machine with one, with a CUDA build of torch (https://pytorch.org/get-started), or "
            "try the script with --device cpu --quick"
        ) from None


def measured(
    models: Mapping[str, Path], device: torch.device, chosen: argparse.Namespace
) -> tuple[list[str], dict[str, str]]:
    """Return the tables of the chosen parts, and how their goals were met."""
    rounds = 2 if chosen.quick else chosen.steps
    runs: dict[str, Callable[[], tuple[str, dict[str, str]]]] = {
        "losses": lambda: losses(str(device), chosen.seed, 2 if chosen.quick else 10),
        "step": lambda: of_step(models, device, rounds, chosen.seed),
        "server": lambda: of_server(models, device, rounds, chosen),
        "quantized": lambda: of_quantized(models, device, rounds, chosen.seed),
    }
    tables: list[str] = []
    goals: dict[str, str] = {}
    for part in chosen.parts:
        made, met = runs[part]()
        tables.append(made)
        goals |= met
    return tables, goals


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cuda:1; cpu to try the script")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each variant")
    parser.add_argument("--folder", type=Path, help="where to keep the checkpoints for another time")
    chosen = parser.parse_args(arguments)
    device = the_device(chosen.device)
    begin(chosen.seed, chosen.threads)
    with tempfile.TemporaryDirectory() as scratch:
        base = chosen.folder or Path(scratch)
        sizes = {"small": SMALL} if chosen.quick else {name: MODELS[name] for name in chosen.models}
        needed = set(chosen.parts) != {"losses"}
        models = {name: base / name for name in sizes} if needed else {}
        for name, folder in models.items():
            random_checkpoint(folder, sizes[name], 4, seed=chosen.seed)
        tables, goals = measured(models, device, chosen)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "none: the script was tried only"
    print(
        section(
            "One GPU",
            {
                "card": card,
                "config": f"random weights in bfloat16, LoRA rank {LORA.rank} on attention, AdamW; losses: "
                "smollm2-135m, two clients, two rounds",
                "seed": chosen.seed,
                "spread": "median of steps in turns, each waited for (middle half)",
                **goals,
            },
            *tables,
        )
    )


if __name__ == "__main__":
    main()
