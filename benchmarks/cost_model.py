"""Compare the cost model's predictions with measured time and memory.

    this machine's calibration --step_legs, client_memory--> predicted seconds and bytes at a cut
    a real split step at that cut, a real client process  --> measured ones

Time: each round repeats the calibration and then a few steps at each cut, so that both see the same state of
the machine. A step is the computation of client and server, one client at a time, without messages. Memory:
the peak of a client process in three steps, above its memory after importing (as in `client_memory.py`), and
the same with `training.checkpoint_blocks`.
Goals: median error of at most 15 % for time and 10 % for memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch

from client_memory import status
from measuring import REPOSITORY, Spread, begin, options, section, table
from splitft.data.text import BatchStream
from splitft.geometry import Span
from splitft.model import Model, open_model
from splitft.protocol import CutGradient, LastHidden, RoundStart
from splitft.run.calibration import calibrate
from splitft.run.fleet import exact_sizes
from splitft.schedule.cost import step_legs
from splitft.schedule.memory import client_memory
from splitft.schedule.profile import Device, Link, ServerProfile
from splitft.schedule.workload import ClientProfile, SharedCosts, Workload
from splitft.specs import LoraSpec, ModelSpec, SplitSpec, TrainingSpec
from splitft.training import Client, ClientSetup, Server
from splitft.training.ranks import RankPolicy
from step_overhead import read_text

CUTS = (2, 8, 15, 22, 28)
LORA = LoraSpec(rank=16, rank_at_cut=None)
BATCHES = (4, 8)
"""Sequences of a batch."""
TIME_GOAL, MEMORY_GOAL = 0.15, 0.10
LINK = Link("none", float("inf"), float("inf"), 0.0)


def workload(stream: BatchStream, steps: range) -> Workload:
    """Return the means over these steps, and the largest batch, for which memory is predicted."""
    batches = [stream.batch(step) for step in steps]
    count = len(batches)
    sequences = sum(len(batch.lengths) for batch in batches)
    return Workload(
        tokens=sum(sum(batch.lengths) for batch in batches) / count,
        labelled_tokens=sum(batch.labelled_tokens for batch in batches) / count,
        sequences=sequences / count,
        padded_length=sum(batch.tokens.numel() for batch in batches) / sequences,
        steps=1,
        largest_tokens=max(batch.tokens.numel() for batch in batches),
    )


class Pair:
    """A client at a cut and its server, without a channel between them."""

    def __init__(
        self, model: Model, cut: int, stream: BatchStream, ranks: RankPolicy, training: TrainingSpec
    ):
        self.client = Client("c", model, cut, ClientSetup(ranks, training, stream))
        self.server = Server(model, Span(cut, model.shape.blocks), ranks, SplitSpec(), training)
        self.server.place({"c": cut})
        self.server.start(1, ["c"], self.server.initial())
        self.client.start(RoundStart(round=1, cut=cut))

    def step(self) -> None:
        """Run forward, head, backward and both optimizers."""
        last = self.server.forward([self.client.forward()])["c"]
        assert isinstance(last, LastHidden)
        at_cut = self.server.backward([self.client.head(last)])["c"]
        self.client.backward(at_cut)


def timed(model: Model, stream: BatchStream, batch: int, rounds: int, steps: int, seed: int) -> list[tuple]:
    """Return for each cut the (predicted, measured) seconds of a step in every round."""
    import time

    training = TrainingSpec(batch_size=batch, steps=10**6)
    ranks = RankPolicy(LORA, model.shape.blocks, "svd", seed)
    sizes = exact_sizes(model, ranks)
    pairs = {cut: Pair(model, cut, stream, ranks, training) for cut in CUTS}
    for pair in pairs.values():
        pair.step()
    found: dict[int, list[tuple[float, float]]] = {cut: [] for cut in CUTS}
    done = 1
    for _ in range(rounds):
        device = calibrate(model, ranks, training)
        work = workload(stream, range(done, done + steps))
        costs = SharedCosts(sizes, ServerProfile(device), LORA)
        for cut, pair in pairs.items():
            began = time.perf_counter()
            for _ in range(steps):
                pair.step()
            spent = (time.perf_counter() - began) / steps
            legs = step_legs(costs, ClientProfile("c", device, LINK, work), cut)
            found[cut].append((sum(leg.seconds for leg in legs), spent))
        done += steps
    return list(found.items())


def peak(cut: int, batch: int, data: Path, seed: int, again: bool) -> dict[str, float]:
    """Return the predicted and the measured peak MiB of a client that runs three steps in this process.

    With `again`, blocks are computed again in the backward pass (`training.checkpoint_blocks`).
    """
    import peft  # noqa: F401  # as the processes of client_memory do

    begin(seed, None)
    model = open_model(ModelSpec())
    model.skeleton()
    training = TrainingSpec(batch_size=batch, checkpoint_blocks=again)
    ranks = RankPolicy(LORA, model.shape.blocks, "svd", seed)
    sizes = exact_sizes(model, ranks)
    stream, _ = read_text(model, data, seed, batch)
    torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    before = status("VmRSS")
    client = Client("c", model, cut, ClientSetup(ranks, training, stream))
    client.start(RoundStart(round=1, cut=cut))
    for step in range(3):
        sent = client.forward()
        rows = torch.randn(sent.labelled_tokens, model.shape.width).to(model.dtype)
        client.head(LastHidden(step=step, hidden=rows))
        client.backward(CutGradient(step=step, gradient=torch.randn(sent.hidden.shape).to(model.dtype)))
    measured = status("VmHWM") - before
    device = Device("any", 1.0, 1.0, 1.0, float("inf"))
    client_profile = ClientProfile("c", device, LINK, workload(stream, range(3)))
    costs = SharedCosts(sizes, ServerProfile(device), LORA, checkpoint_blocks=again)
    return {"predicted": client_memory(costs, client_profile, cut).total / 2**20, "measured": measured}


def _in_a_process(cut: int, batch: int, chosen: object, again: bool = False) -> dict[str, float]:
    command = [sys.executable, __file__, "--seed", str(chosen.seed), "--data", str(chosen.data)]
    command += ["--peak", str(cut), str(batch), str(int(again))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _error(predicted: float, measured: float) -> float:
    return predicted / measured - 1


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared/data/e2e/devset.csv")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each cut in a round")
    parser.add_argument(
        "--peak",
        type=int,
        nargs=3,
        help="measure memory at this cut and batch, 1 to compute blocks again; as JSON",
    )
    chosen = parser.parse_args()
    if chosen.peak:
        cut, batch, again = chosen.peak
        print(json.dumps(peak(cut, batch, chosen.data, chosen.seed, bool(again))))
        return
    rounds, steps = (1, 2) if chosen.quick else (chosen.rounds, chosen.steps)
    begin(chosen.seed, chosen.threads)
    model = open_model(ModelSpec())
    rows, time_errors, memory_errors = [], [], []
    for batch in BATCHES:
        stream, what = read_text(model, chosen.data, chosen.seed, batch)
        peaks = {cut: _in_a_process(cut, batch, chosen) for cut in CUTS}
        again = {cut: _in_a_process(cut, batch, chosen, again=True) for cut in CUTS}
        for cut, pairs in timed(model, stream, batch, rounds, steps, chosen.seed):
            errors = [_error(*pair) for pair in pairs]
            memory = peaks[cut]
            memory_error = _error(memory["predicted"], memory["measured"])
            again_error = _error(again[cut]["predicted"], again[cut]["measured"])
            time_errors.append(median(errors))
            memory_errors += [memory_error, again_error]
            rows.append(
                (
                    batch,
                    cut,
                    f"{median(p for p, _ in pairs):.3f}",
                    f"{median(m for _, m in pairs):.3f}",
                    f"{Spread.of(errors)}",
                    f"{memory['predicted']:.0f}",
                    f"{memory['measured']:.0f}",
                    f"{memory_error:+.3f}",
                    f"{again[cut]['predicted']:.0f}",
                    f"{again[cut]['measured']:.0f}",
                    f"{again_error:+.3f}",
                )
            )
    time_error, memory_error = (median(map(abs, errors)) for errors in (time_errors, memory_errors))
    print(
        section(
            "Cost model",
            {
                "config": f"{model.spec.name}, {model.spec.dtype}, LoRA rank {LORA.rank} on attention, "
                f"labels on the client, AdamW; {rounds} rounds of a calibration and {steps} steps a cut",
                "text": what,
                "seed": chosen.seed,
                "spread": "median over rounds of predicted / measured - 1 (middle half)",
                f"goal, median error of time at most {TIME_GOAL:.0%}": _verdict(time_error, TIME_GOAL),
                f"goal, median error of memory at most {MEMORY_GOAL:.0%}": _verdict(
                    memory_error, MEMORY_GOAL
                ),
            },
            table(
                (
                    "batch",
                    "cut",
                    "predicted s",
                    "measured s",
                    "error",
                    "predicted MiB",
                    "measured MiB",
                    "error",
                    "predicted MiB, checkpointed",
                    "measured MiB",
                    "error",
                ),
                rows,
            ),
        )
    )


def _verdict(found: float, goal: float) -> str:
    return f"{found:.1%}, {'met' if found <= goal else 'missed'}"


if __name__ == "__main__":
    main()
