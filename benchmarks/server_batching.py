"""Measure when it is faster for the server to process several clients' batches together.

    at once          rows of N clients in one product with the frozen weights, one batched product of factors
    after another    the same N batches, each alone

A server step is forward, backward and the optimizer steps of N clients' own factors, at one cut, on the
blocks behind it. Large products already use all cores, small ones do not. The table shows up to how many
padded tokens grouping is faster; `split.group_tokens` is set from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from measuring import Spread, begin, interleaved, options, ratio, section, table
from splitft.geometry import Span
from splitft.model import Model, open_model
from splitft.protocol import Activations, HeadGradient
from splitft.specs import LoraSpec, ModelSpec, SplitSpec, TrainingSpec
from splitft.training import Server
from splitft.training.ranks import RankPolicy

CUT = 2
CLIENTS = (1, 2, 4, 8, 16)
BATCHES = {"small": (1, 32), "medium": (2, 64), "large": (4, 128)}
"""(sequences, tokens of each sequence) of one client."""
PAYS = 1.05
"""Throughput ratio from which grouping counts as a gain."""
CPU = torch.device("cpu")
NEARLY = 0.98
"""A group is large enough from this share of the highest throughput."""


def server_for(model: Model, clients: Sequence[str], seed: int, device: torch.device = CPU) -> Server:
    """Return a server in its first round with these clients, each with its own factors."""
    blocks, training = model.shape.blocks, TrainingSpec(steps=10**6)
    server = Server(
        model,
        Span(CUT, blocks),
        RankPolicy(LoraSpec(), blocks, "svd", seed),
        SplitSpec(),
        training,
        (device,),
    )
    server.place(dict.fromkeys(clients, CUT))
    server.start(1, clients, server.initial())
    return server


def activations(client: str, sequences: int, tokens: int, model: Model) -> Activations:
    """Return random hidden states; their values do not change the cost."""
    hidden = torch.randn(sequences * tokens, model.shape.width).to(model.dtype)
    labelled = ((tokens // 2, tokens - 1),) * sequences  # the second half is the completion
    return Activations(
        client=client,
        round=1,
        step=0,
        training=True,
        lengths=(tokens,) * sequences,
        labelled=labelled,
        hidden=hidden,
    )


def step(server: Server, messages: Sequence[Activations], gradients: Sequence[HeadGradient]) -> None:
    """Run forward, backward and the optimizers of these clients."""
    server.forward(messages)
    server.backward(gradients)


def gradient(message: Activations, model: Model) -> HeadGradient:
    """Return a random gradient in place of the one that the client's head would send."""
    rows = torch.randn(message.labelled_tokens, model.shape.width).to(model.dtype) / message.labelled_tokens
    return HeadGradient(client=message.client, round=1, step=message.step, loss=1.0, gradient=rows)


def variants(model: Model, count: int, size: tuple[int, int], seed: int) -> dict[str, Callable[[], None]]:
    """Return both ways to run one step for `count` clients."""
    names = [f"client-{number:02d}" for number in range(count)]
    server = server_for(model, names, seed)
    messages = [activations(name, *size, model) for name in names]
    gradients = [gradient(message, model) for message in messages]

    def at_once() -> None:
        step(server, messages, gradients)

    def after_another() -> None:
        for message, one in zip(messages, gradients, strict=True):
            step(server, [message], [one])

    return {"at once": at_once, "after another": after_another}


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=3072, help="padded tokens to measure in each cell")
    chosen = parser.parse_args()
    begin(chosen.seed, chosen.threads)
    model = open_model(ModelSpec())
    rows, gains = [], dict[int, list[tuple[float, float]]]()
    for name, size in BATCHES.items():
        cells, speeds = [], []
        for count in CLIENTS:
            tokens = count * size[0] * size[1]
            if chosen.quick and tokens > 512:
                continue
            rounds = 2 if chosen.quick else min(10, max(3, chosen.tokens // tokens))
            seconds = interleaved(variants(model, count, size, chosen.seed), rounds, int(tokens < 4096))
            gain = ratio(seconds["after another"], seconds["at once"])
            cells.append(f"{gain.median:.2f} ({gain.low:.2f} to {gain.high:.2f})")
            speed = tokens / Spread.of(seconds["at once"]).median
            speeds.append(f"{speed:.0f}")
            if count > 1:
                gains.setdefault(tokens, []).append((gain.median, speed))
        missing = ["-"] * (len(CLIENTS) - len(cells))
        rows.append([f"{name}, {size[0]} x {size[1]}", "ratio", *cells, *missing])
        rows.append(["", "tokens/s", *speeds, *missing])
    fastest = max(speed for found in gains.values() for _, speed in found)
    totals, enough = [], []
    for tokens, found in sorted(gains.items()):
        ratios, speeds = ([f"{one[i]:.{2 - 2 * i}f}" for one in found] for i in (0, 1))
        pays = min(gain for gain, _ in found) >= PAYS
        totals.append((tokens, ", ".join(ratios), ", ".join(speeds), "yes" if pays else "no"))
        if pays and max(speed for _, speed in found) >= NEARLY * fastest:
            enough.append(tokens)
    print(
        section(
            "Server batching",
            {
                "config": f"{model.spec.name}, {model.spec.dtype}, blocks {CUT} to {model.shape.blocks - 1}, "
                "LoRA of the defaults on attention, AdamW; forward, backward and optimizer",
                "seed": chosen.seed,
                "spread": f"median of ratios of neighbouring steps (middle half), 3 to 10 of each; {PAYS} "
                "and more counts as a gain",
                f"smallest gaining group within {1 - NEARLY:.0%} of the highest throughput": (
                    f"{min(enough, default=0)} padded tokens (larger ones cost memory, padding and waiting)"
                ),
            },
            "Throughput of one step for N clients at once over N steps one after the other:",
            table(["batch of a client", "", *(f"N = {count}" for count in CLIENTS)], rows),
            "The same by size of the group:",
            table(["padded tokens together", "ratios", "tokens/s", "gain"], totals),
        )
    )


if __name__ == "__main__":
    main()
