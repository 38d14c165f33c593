"""Measure the products of many unequal clients' LoRA factors: one after the other, grouped, padded.

    loop       one product for each client, as clients run that cannot go together
    grouped    all rows packed, `torch._grouped_mm` (on the CPU a loop inside one call)
    padded     rows padded to those of the largest client, a batched product

A pass is forward and backward through one adapted layer of N clients with 1 to 4 sequences each and ranks 4,
8 and 16 by turns; its optimizer step is on or off. The frozen product is the same for all and is measured,
too. `equal` are clients of the same rank and number of sequences. The last table steps N optimizers one after
the other and in one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
from torch import nn

from measuring import Spread, begin, interleaved, options, ratio, section, table
from splitft.adapters import AdapterBank, AdapterState, Factors, LocalOptimizer, attach, lora, step_together
from splitft.adapters.grouped import grouped_mm_works, product_kind
from splitft.specs import TrainingSpec

CLIENTS = (8, 32, 64)
RANKS = (4, 8, 16)
WIDTHS = {"cpu": (576,), "cuda": (576, 2048, 4096)}
"""Inputs and outputs of the layer by device: SmolLM2-135M, 1B, 8B."""
TOKENS = {"small": 32, "large": 256}
"""Tokens of a sequence."""
KEY = (0, "layer")


@contextmanager
def forced(kind: str | None) -> Iterator[None]:
    """Make every layer take this product; None for one client after the other."""
    with mock.patch.object(lora, "product_kind", return_value=kind):
        yield


class Layer:
    """One adapted layer with its clients, their rows and optimizers."""

    def __init__(self, clients: int, width: int, tokens: int, equal: bool, place: torch.Tensor) -> None:
        """`place` is an empty tensor of the type and device to use."""
        dtype, device = place.dtype, place.device
        self.block = nn.Sequential()
        linear = nn.Linear(width, width, bias=False, dtype=dtype, device=device)
        self.block.add_module("layer", linear.requires_grad_(False))
        self.bank: AdapterBank = attach(
            [self.block], "all-linear", 2.0, dtype, device_of=lambda block: device
        )
        self.rows = [(f"client-{number:02d}", 2 if equal else 1 + number % 4) for number in range(clients)]
        for number, (slot, _) in enumerate(self.rows):
            rank = max(RANKS) if equal else RANKS[number % len(RANKS)]
            factors = Factors(torch.randn(rank, width) / width**0.5, torch.randn(width, rank) / 100)
            self.bank.put(slot, AdapterState({KEY: factors}))
        self.optimizers = [
            LocalOptimizer(self.bank.parameters(slot), TrainingSpec(lr=1e-6)) for slot, _ in self.rows
        ]
        self.counts = [count * tokens for _, count in self.rows]
        sequences = sum(count for _, count in self.rows)
        self.x = torch.randn(sequences, tokens, width).to(place).requires_grad_()
        self.gradient = torch.randn(sequences, tokens, width).to(place)

    def run(self, kind: str | None) -> None:
        """Run forward, backward and the optimizers."""
        self.x.grad = None
        with forced(kind), self.bank.routed(self.rows):
            self.block(self.x).backward(self.gradient)
        step_together(self.optimizers)
        synchronize(self.x.device)

    def chosen(self) -> str:
        """Return the product that training takes here."""
        return product_kind(self.counts, [self.x.shape[-1]] * 2, self.x) or "loop"


def synchronize(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kinds(place: torch.Tensor) -> dict[str, str | None]:
    """Return the products that this device and type have."""
    grouped = {"grouped": "grouped"} if grouped_mm_works(place.device, place.dtype) else {}
    return {"loop": None, **grouped, "padded": "padded"}


def passes(place: torch.Tensor, quick: bool, rounds: int) -> list[list[object]]:
    """Return a row for each shape: seconds of the loop, and how many times quicker the others are."""
    rows: list[list[object]] = []
    widths = WIDTHS["cuda" if place.device.type == "cuda" else "cpu"]
    for width in widths[:1] if quick else widths:
        for name, tokens in TOKENS.items():
            for equal in (False, True):
                for clients in CLIENTS[:1] if quick else CLIENTS:
                    if quick and (name == "large" or equal):
                        continue
                    layer = Layer(clients, width, tokens, equal, place)
                    variants = {label: partial(layer.run, kind) for label, kind in kinds(place).items()}
                    seconds = interleaved(variants, rounds, 2)
                    gains = [
                        str(ratio(seconds["loop"], seconds[label])) if label in seconds else "-"
                        for label in ("grouped", "padded")
                    ]
                    shape = f"{sum(layer.counts)} rows, {'equal' if equal else 'unequal'}"
                    milliseconds = f"{1000 * Spread.of(seconds['loop']).median:.1f}"
                    rows.append([width, name, clients, shape, milliseconds, *gains, layer.chosen()])
    return rows


def steps(place: torch.Tensor, counts: Sequence[int], rounds: int) -> list[list[object]]:
    """Return a row for each number of clients: milliseconds of their optimizer steps, both ways."""
    rows: list[list[object]] = []
    for clients in counts:
        layers = [Layer(clients, 576, 1, False, place) for _ in range(4)]
        optimizers = [one for layer in layers for one in layer.optimizers]

        def begin_step(layers: Sequence[Layer] = tuple(layers)) -> None:
            for layer in layers:
                for slot, _ in layer.rows:
                    for parameter in layer.bank.parameters(slot).values():
                        parameter.grad = torch.zeros_like(parameter)

        def after_another(optimizers: Sequence[LocalOptimizer] = tuple(optimizers)) -> None:
            for one in optimizers:
                one.step()
            synchronize(place.device)

        def together(optimizers: Sequence[LocalOptimizer] = tuple(optimizers)) -> None:
            step_together(optimizers)
            synchronize(place.device)

        seconds: dict[str, list[float]] = {"after another": [], "together": []}
        for number in range(-1, rounds):
            for name, run in (("after another", after_another), ("together", together)):
                begin_step()
                spent = interleaved({name: run}, 1, 0)[name]
                seconds[name] += spent if number >= 0 else []
        gain = ratio(seconds["after another"], seconds["together"])
        rows.append([clients, f"{1000 * Spread.of(seconds['after another']).median:.2f}", str(gain)])
    return rows


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15)
    chosen = parser.parse_args()
    begin(chosen.seed, chosen.threads)
    rounds = 2 if chosen.quick else chosen.rounds
    parts = []
    for dtype in (torch.float32, torch.bfloat16):
        place = torch.empty(0, dtype=dtype, device=chosen.device)
        head = ["width", "tokens", "clients", "batch", "loop, ms", "grouped", "padded", "training takes"]
        parts += [
            f"{str(dtype).removeprefix('torch.')} on {chosen.device}, loop's seconds over those of each:",
            table(head, passes(place, chosen.quick, rounds)),
        ]
    place = torch.empty(0, device=chosen.device)
    counts = CLIENTS[:1] if chosen.quick else CLIENTS
    parts += [
        "AdamW steps of N clients (4 layers each) one after the other over one call:",
        table(["clients", "one after the other, ms", "ratio"], steps(place, counts, rounds)),
    ]
    name = torch.cuda.get_device_name() if chosen.device.startswith("cuda") else "CPU"
    facts = {
        "config": f"one layer without bias on {name}, ranks {RANKS} by turns, 1 to 4 sequences a client "
        f"({TOKENS['small']} or {TOKENS['large']} tokens); forward, backward, AdamW",
        "seed": chosen.seed,
        "spread": f"median of ratios of neighbouring passes (middle half), {rounds} of each",
    }
    print(section("Products of unequal clients", facts, *parts))


if __name__ == "__main__":
    main()
