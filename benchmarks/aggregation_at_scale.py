"""Measure the seconds, memory and error of aggregating many clients at the shapes of an 8B model.

    clients' factors of every layer --aggregate--> seconds, working memory, reported error
    one block of them --dense float64--> the error that it has, and the least that its rank can have

Two populations: clients that began the round from the same factors, as in a run, and unrelated ones, whose
mean product has no leading directions. Working memory is the peak of the process above the clients' factors
and the result. `decomposed` is one block without compression (QR of all stacked factors), times the blocks.
Goal: 100 clients at rank 16 in under 60 s on two cores, and for factors and zero-pad the same working memory
at any number of clients.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

import torch

from client_memory import status
from measuring import begin, options, section, table
from splitft.adapters import AdapterState, Aggregated, Factors, Fresh, aggregate, mean_product
from splitft.adapters.factoring import refactored, stacked
from splitft.adapters.state import Key, fresh_rows

Shapes = Mapping[str, tuple[int, int]]
"""(inputs, outputs) of each adapted layer of a block."""
Members = list[tuple[float, AdapterState]]

LLAMA_8B: Shapes = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 1024),
    "self_attn.v_proj": (4096, 1024), "self_attn.o_proj": (4096, 4096),
}  # fmt: skip
"""Attention of Llama-3.1-8B, the default targets."""
FEED_FORWARD: Shapes = {
    "mlp.gate_proj": (4096, 14336), "mlp.up_proj": (4096, 14336), "mlp.down_proj": (14336, 4096),
}  # fmt: skip
SMALL: Shapes = {"q": (512, 512), "k": (512, 128)}
GOAL_S, GOAL_CLIENTS = 60.0, 100
OWN = 0.5
"""Size of what a client learnt alone, relative to what all learnt, in the population that began together."""


def population(shapes: Shapes, blocks: int, clients: int, rank: int, related: bool, seed: int) -> Members:
    """Return clients of unequal weights; related ones share A, up to a small change, and most of B."""
    generator = torch.Generator().manual_seed(seed)
    factors: list[dict[Key, Factors]] = [{} for _ in range(clients)]
    for block in range(blocks):
        for target, (inputs, outputs) in shapes.items():
            key = (block, target)
            start = fresh_rows(key, rank, inputs, seed)
            learnt = torch.randn(outputs, rank, generator=generator) * 0.01
            for own in factors:
                A = torch.randn(rank, inputs, generator=generator) / math.sqrt(3 * inputs)
                B = torch.randn(outputs, rank, generator=generator) * 0.01
                own[key] = Factors(start + 0.1 * A, learnt + OWN * B) if related else Factors(A, B)
    return [(1.0 + index % 3, AdapterState(own)) for index, own in enumerate(factors)]


def aggregated(rule: str, members: Members, rank: int) -> tuple[Aggregated, float, float]:
    """Return a rule's result, its seconds, and the MiB that it needed beside members and result."""
    ranks = dict.fromkeys({block for block, _ in members[0][1]}, rank)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    before, began = status("VmRSS"), time.perf_counter()
    done = aggregate(rule, members, ranks, Fresh(0, 1))
    seconds, peak = time.perf_counter() - began, status("VmHWM") - before
    made = sum(
        t.numel() * t.element_size()
        for t in (*done.state.tensors().values(), *done.folded.tensors().values())
    )
    return done, seconds, peak - made / 2**20


def dense_error(members: Members, done: Aggregated) -> float:
    """Return the error of a result from dense products in float64."""
    missed = wanted = 0.0
    total = sum(weight for weight, _ in members)
    for key in members[0][1]:
        mean = sum(w / total * state[key].B.double() @ state[key].A.double() for w, state in members)
        assert isinstance(mean, torch.Tensor)
        missed += float((mean - done.product(key).double()).square().sum())
        wanted += float(mean.square().sum())
    return math.sqrt(missed / wanted)


def least_error(members: Members, rank: int) -> float:
    """Return the error of the best factors of a rank, from singular values of stacked factors in float64."""
    total, missed, wanted = sum(weight for weight, _ in members), 0.0, 0.0
    for key in members[0][1]:
        whole = stacked([(weight / total, state[key]) for weight, state in members])
        squared = refactored(whole).B.square().sum(0).sort(descending=True).values
        missed, wanted = missed + float(squared[rank:].sum()), wanted + float(squared.sum())
    return math.sqrt(missed / wanted)


def first_block(members: Members) -> Members:
    """Return the members' first block."""
    return [(weight, state.within([0])) for weight, state in members]


def row(rule: str, members: Members, rank: int) -> tuple[str, ...]:
    """Measure one rule on one population."""
    done, seconds, memory = aggregated(rule, members, rank)
    one = first_block(members)
    part, _, _ = aggregated(rule, one, rank)
    return (
        rule, str(len(members)), f"{seconds:.1f}", f"{memory:.0f}", f"{done.error:.4f}", f"{part.error:.4f}",
        f"{dense_error(one, part):.4f}",
    )  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 30, GOAL_CLIENTS])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--rules", nargs="+", default=["factors", "zero-pad", "svd"])
    parser.add_argument("--targets", choices=("attention", "all-linear"), default="attention")
    return parser.parse_args()


def tables(shapes: Shapes, blocks: int, counts: Sequence[int], chosen: argparse.Namespace) -> list[str]:
    """Return a table of each population."""
    parts = []
    for related in (True, False):
        rows = []
        for clients in counts:
            members = population(shapes, blocks, clients, chosen.rank, related, chosen.seed)
            rows += [row(rule, members, chosen.rank) for rule in chosen.rules]
        one = first_block(members)
        least = least_error(one, chosen.rank)
        with mock.patch.multiple("splitft.adapters.mean_product", MOST_STACKED=10**9):
            _, seconds, _ = aggregated("svd", one, chosen.rank)
        what = "Clients that began from the same factors" if related else "Unrelated clients"
        head = (
            "rule", "clients", "seconds", "working MiB", "reported error", "of one block", "dense in float64"
        )  # fmt: skip
        parts.append(
            f"{what}. With {len(members)}, the least error of rank {chosen.rank} is {least:.4f} (one block); "
            f"svd without compression takes {seconds:.1f} s a block, {seconds * blocks:.0f} s in all.\n\n"
            + table(head, rows)
        )
        del members, one
    return parts


def main() -> None:
    chosen = arguments()
    begin(chosen.seed, chosen.threads)
    shapes = LLAMA_8B if chosen.targets == "attention" else {**LLAMA_8B, **FEED_FORWARD}
    blocks, counts = chosen.blocks, chosen.clients
    if chosen.quick:
        shapes, blocks, counts = SMALL, 2, [8, 24]
    layers = ", ".join(f"{outputs} x {inputs}" for inputs, outputs in shapes.values())
    print(
        section(
            "Aggregation at 8B shapes",
            {
                "config": f"{blocks} blocks, layers {layers}, rank "
                f"{chosen.rank}, float32; stacks above rank {mean_product.MOST_STACKED} are compressed",
                "seed": chosen.seed,
                "goal": f"{GOAL_CLIENTS} clients under {GOAL_S:.0f} s",
            },
            *tables(shapes, blocks, counts, chosen),
        )
    )


if __name__ == "__main__":
    main()
