"""Measure the traffic saved by sending no padding, and only labelled positions to the head.

    padded, all positions    sequences padded to the longest of the batch; T positions return to the client
    real, all positions      without padding
    real, labelled           and only positions whose next token is labelled return to the client

Complete frames (header and encoded tensors) are built for the batches that a client draws in an epoch. Their
hidden states are zeros, which does not change the length with bf16 and fp32. One step of the real model with
a real client and server checks the counted lengths.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from measuring import REPOSITORY, begin, options, section, table
from splitft.data.corpora import read_records
from splitft.data.text import Batch, BatchStream
from splitft.data.tokens import tokenise
from splitft.geometry import Span
from splitft.model import Model, open_model
from splitft.protocol import (
    Activations,
    CutGradient,
    HeadGradient,
    LastHidden,
    Message,
    MessageSerializer,
    RoundStart,
)
from splitft.protocol.channel import Channel
from splitft.specs import DataSpec, LoraSpec, ModelSpec, SplitSpec, TrainingSpec, WireSpec
from splitft.training import Client, ClientSetup, Server
from splitft.training.ranks import RankPolicy

DATA = REPOSITORY.parent / "shared/data"
TEXTS = {
    "E2E": (DATA / "e2e/devset.csv", DataSpec(prompt="mr", completion="ref")),
    "GSM8K": (DATA / "gsm8k/train.jsonl", DataSpec(prompt="question", completion="answer")),
}
LEGS = ("hidden up", "hidden down", "gradient up", "gradient down")
"""At the cut, at the head, and the gradients of both."""
Ranges = Sequence[tuple[int, int]]


def frames_of(batch: Batch, ways: str, terms: MessageSerializer) -> dict[str, int]:
    """Return the bytes of a step's four frames, by leg."""
    lengths: tuple[int, ...] = batch.lengths
    labelled: Ranges = [(first - 1, n - 1) for first, n in zip(batch.labelled_from, lengths, strict=True)]
    if ways == "padded, all positions":
        lengths = (max(lengths),) * len(lengths)
    if ways != "real, labelled":
        labelled = [(0, n) for n in lengths]
    N, M = sum(lengths), sum(stop - start for start, stop in labelled)
    at_cut, at_head = (torch.zeros(rows, terms.width, dtype=terms.dtype) for rows in (N, M))
    sent = {"client": "client-1", "round": 1, "step": 0}
    messages: list[Message] = [
        Activations(**sent, training=True, lengths=lengths, labelled=tuple(labelled), hidden=at_cut),
        LastHidden(step=0, hidden=at_head),
        HeadGradient(**sent, loss=0.0, gradient=at_head),
        CutGradient(step=0, gradient=at_cut),
    ]
    return {leg: len(terms.to_bytes(message)) for leg, message in zip(LEGS, messages, strict=True)}


def stream_of(model: Model, spec: DataSpec, size: int, seed: int) -> tuple[BatchStream, int]:
    """Return batches of all the text, and their number in an epoch."""
    text = tokenise(read_records(spec, None, seed), model.tokenizer(), spec.max_tokens, spec.separator)
    return BatchStream(text.examples, size, None, seed, 0), max(1, len(text.examples) // size)


def real_step(model: Model, stream: BatchStream, terms: MessageSerializer, seed: int) -> dict[str, int]:
    """Return the bytes of the frames of one real training step."""
    ranks, training = RankPolicy(LoraSpec(), model.shape.blocks, "svd", seed), TrainingSpec()
    server = Server(model, Span(2, model.shape.blocks), ranks, SplitSpec(), training)
    server.place({"client-1": 2})
    server.start(1, ["client-1"], server.initial())
    client = Client("client-1", model, 2, ClientSetup(ranks, training, stream))
    client.start(RoundStart(round=1, cut=2))
    sizes: list[int] = []
    line = Channel("client-1", terms, lambda client, direction, data: sizes.append(len(data)))
    last = server.forward([line.up(client.forward())])["client-1"]
    at_cut = server.backward([line.up(client.head(line.down(last)))])["client-1"]
    client.backward(line.down(at_cut))
    return dict(zip(LEGS, sizes, strict=True))


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--codec", default="bf16", choices=("bf16", "fp32"))
    chosen = parser.parse_args()
    begin(chosen.seed, chosen.threads)
    model = open_model(ModelSpec())
    wire = WireSpec(hidden=chosen.codec, gradient=chosen.codec)
    terms = MessageSerializer(model.shape.width, model.dtype, torch.float32, wire)
    rows, facts = [], {}
    for name, (path, spec) in TEXTS.items():
        spec = spec.model_copy(update={"source": str(path), "max_tokens": chosen.max_tokens})
        if not path.is_file():
            name, spec = "python-docs", DataSpec(max_tokens=chosen.max_tokens)
        stream, epoch = stream_of(model, spec, chosen.batch_size, chosen.seed)
        batches = [stream.batch(step) for step in range(20 if chosen.quick else epoch)]
        counts: dict[str, Counter[str]] = {}
        for ways in ("padded, all positions", "real, all positions", "real, labelled"):
            counts[ways] = Counter()
            for batch in batches:
                counts[ways].update(frames_of(batch, ways, terms))
        trained, counted = real_step(model, stream, terms, chosen.seed), frames_of(batches[0], ways, terms)
        differing = {leg: trained[leg] - counted[leg] for leg in LEGS}
        if max(map(abs, differing.values())) > 64:  # digits of the loss and of header fields
            raise SystemExit(
                f"{name}: the frames of a real step differ from the counted ones by {differing} bytes"
            )
        tokens, padded, labelled = (
            sum(map(count, batches))
            for count in (lambda b: sum(b.lengths), lambda b: b.tokens.numel(), lambda b: b.labelled_tokens)
        )
        facts[name] = (
            f"{len(batches)} batches of {chosen.batch_size}, {tokens:,} tokens ({padded:,} padded), "
            f"{labelled:,} with a label ({labelled / tokens:.0%})"
        )
        whole = counts["padded, all positions"].total()
        for ways, count in counts.items():
            megabytes = [f"{count[leg] / 1e6:.1f}" for leg in LEGS]
            saved = f"{whole / count.total():.2f}"
            rows.append((name, ways, *megabytes, f"{count.total() / 1e6:.1f}", saved))
    print(
        section(
            "Traffic without padding",
            {
                "config": f"{model.spec.name}, D = {terms.width}, {chosen.codec}, labels on the client, "
                f"at most {chosen.max_tokens} tokens; one epoch of batches drawn at random",
                **facts,
                "check": "the frames of one real training step have the counted lengths",
                "seed": chosen.seed,
                "spread": "none: bytes are counted, not sampled",
            },
            table(("text", "sent", *(f"{leg}, MB" for leg in LEGS), "all, MB", "reduction"), rows),
        )
    )


if __name__ == "__main__":
    main()
