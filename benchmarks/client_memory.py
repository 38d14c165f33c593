"""Measure the memory of a client against that of training the whole model.

    client    embedding, blocks [0, k), and with labels on the client the head: one split training step
    whole     transformers + peft, all L blocks: one training step on the same batch

Each runs in its own process, which first imports everything; its memory at that point is subtracted from the
peak. The server's messages are random numbers of the same size. The peak is the kernel's (VmHWM, resident
memory), including the pages of the weights' file that were touched. Both run the first step: forward, loss,
backward, AdamW.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from measuring import Spread, begin, options, ratio, section, table
from splitft.data.text import BatchStream, Example
from splitft.model import Model, open_model
from splitft.protocol import Activations, CutGradient, LastHidden, RoundStart
from splitft.specs import LoraSpec, ModelSpec, TrainingSpec
from splitft.training import Client, ClientSetup
from splitft.training.ranks import RankPolicy
from step_overhead import ordinary, plain_step

SEQUENCES, TOKENS = 8, 64
LORA = LoraSpec(rank=16, rank_at_cut=None)
WHOLE = "whole, transformers + peft"
CASES = {
    "client, cut 2, labels on the client": (2, "client"),
    "client, cut 2, labels on the server": (2, "server"),
    "client, cut 15, labels on the client": (15, "client"),
    WHOLE: None,
}
"""(cut, labels) of a client, or None for the whole model."""


def stream_of_random_text(model: Model, seed: int) -> BatchStream:
    """Return one batch of random sequences of one length; the loss covers the second half of each."""
    tokens = torch.randint(model.shape.vocab, (SEQUENCES, TOKENS), generator=torch.manual_seed(seed))
    examples = [Example(tuple(row), TOKENS // 2) for row in tokens.tolist()]
    return BatchStream(examples, SEQUENCES, None, seed, 0)


def client_step(model: Model, cut: int, labels: str, seed: int) -> int:
    """Run a client's first step with random messages of the server; return its frozen parameters."""
    side = "client" if labels == "client" else "server"
    ranks = RankPolicy(LORA, model.shape.blocks, "svd", seed)
    setup = ClientSetup(ranks, TrainingSpec(), stream_of_random_text(model, seed), labels=side)
    client = Client("c", model, cut, setup)
    client.start(RoundStart(round=1, cut=cut))
    sent: Activations = client.forward()
    if side == "client":
        rows = torch.randn(sent.labelled_tokens, model.shape.width).to(model.dtype)
        client.head(LastHidden(step=0, hidden=rows))
    gradient = torch.randn(sent.hidden.shape).to(model.dtype)
    client.backward(CutGradient(step=0, gradient=gradient, loss=None if side == "client" else 1.0))
    return client.segment.parameter_count()


def whole_step(model: Model, seed: int) -> int:
    """Run the first step of the whole model with peft; return its frozen parameters."""
    plain_step(model, stream_of_random_text(model, seed), ordinary)()
    return sum(parameter.numel() for parameter in model.skeleton().parameters())


def measure(case: str, seed: int) -> dict[str, float]:
    """Measure one case in this process: frozen parameters, and peak MiB above the memory after importing."""
    import peft  # noqa: F401  # both processes import the same libraries

    begin(seed, None)
    model = open_model(ModelSpec())
    model.skeleton()  # imports the modelling code
    torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    before = status("VmRSS")
    where = CASES[case]
    step: Callable[[], int]
    step = (lambda: whole_step(model, seed)) if where is None else (lambda: client_step(model, *where, seed))
    parameters = step()
    return {"parameters": parameters, "before": before, "peak": status("VmHWM") - before}


def status(field: str) -> float:
    """Return a field of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def _in_a_process(case: str, seed: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--seed", str(seed), "--case", case]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, help="measure one case in this process, as JSON")
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    if chosen.case:
        print(json.dumps(measure(chosen.case, chosen.seed)))
        return
    begin(chosen.seed, chosen.threads)
    model = open_model(ModelSpec())
    found: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for _ in range(1 if chosen.quick else chosen.repeats):
        for case in CASES:
            found[case].append(_in_a_process(case, chosen.seed))
    peaks = {case: [one["peak"] for one in measured] for case, measured in found.items()}
    parameters = {case: measured[0]["parameters"] for case, measured in found.items()}
    rows = [
        (
            case,
            f"{parameters[case] / 1e6:.1f} M",
            f"{parameters[case] / parameters[WHOLE]:.3f}",
            f"{Spread.of(peaks[case]).median:.0f} MiB",
            ratio(peaks[case], peaks[WHOLE]),
        )
        for case in CASES
    ]
    importing = Spread.of([one["before"] for measured in found.values() for one in measured]).median
    print(
        section(
            "Client memory",
            {
                "config": f"{model.spec.name}, {model.spec.dtype}, {model.shape.blocks} blocks, LoRA rank "
                f"{LORA.rank} on attention, one step on {SEQUENCES} x {TOKENS} random tokens, AdamW",
                "seed": chosen.seed,
                "spread": f"median of {len(peaks[WHOLE])} processes each, in turns (middle half)",
                "subtracted": f"{importing:.0f} MiB that each process has after importing all libraries",
            },
            table(("process", "frozen parameters", "to whole", "peak memory", "to whole"), rows),
        )
    )


if __name__ == "__main__":
    main()
