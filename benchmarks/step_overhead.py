"""Measure the time of a split training step against that of an unsplit one.

    plain   transformers + peft: one model, padded batch with attention mask, labels -100 where none are
    split   client -> bytes -> server -> bytes -> client's head -> bytes -> server -> bytes -> client

Both train the same LoRA (attention q, k, v, o; one rank everywhere) on the same batches with the same AdamW
and dtype. The split step also omits unnecessary work of the plain step: logits of positions without a label,
a mask that right-padded causal attention does not need, and a slow backward pass of attention. The plain step
is therefore also measured with these optimizations, added one by one; the overhead of splitting is the ratio
to the plain step with all of them. Goal: at most 1.0 times the plain step, at a shallow and at a deep cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from measuring import REPOSITORY, Spread, begin, interleaved, options, ratio, section, table
from splitft.data.corpora import read_records
from splitft.data.text import Batch, BatchStream
from splitft.data.tokens import tokenise
from splitft.geometry import Span
from splitft.model import Model, open_model
from splitft.model.attention import train_in_float32
from splitft.protocol import MessageSerializer, RoundStart
from splitft.protocol.channel import Channel
from splitft.specs import DataSpec, LoraSpec, ModelSpec, SplitSpec, TrainingSpec, WireSpec
from splitft.training import Client, ClientSetup, Server
from splitft.training.ranks import RankPolicy

CUTS = (2, 15)
LORA = LoraSpec(rank=16, rank_at_cut=None, alpha=32)
TRAINING = TrainingSpec(batch_size=8, lr=5e-4, steps=10**6)
CPU, WIRE = torch.device("cpu"), WireSpec()
GOAL = 1.0
"""Seconds of a split step over seconds of a plain step."""

Step = Callable[[], float]
"""Train on the next batch and return its loss."""


def split_steps(
    model: Model,
    stream: BatchStream,
    seed: int,
    cuts: Sequence[int] = CUTS,
    device: torch.device = CPU,
    wire: WireSpec = WIRE,
) -> dict[str, Step]:
    """Return a split step for each cut; messages are encoded to bytes, and labels are on the client."""
    blocks, names = model.shape.blocks, {f"cut {cut}": cut for cut in cuts}
    ranks = RankPolicy(LORA, blocks, "svd", seed)
    terms = MessageSerializer(model.shape.width, model.dtype, torch.float32, wire)
    server = Server(model, Span(min(cuts), blocks), ranks, SplitSpec(), TRAINING, (device,))
    server.place(names)
    server.start(1, list(names), server.initial())
    return {
        f"split, {name}": _split_step(
            Client(name, model, cut, ClientSetup(ranks, TRAINING, stream, device=device)), terms, server
        )
        for name, cut in names.items()
    }


def _split_step(client: Client, terms: MessageSerializer, server: Server) -> Step:
    name = client.name
    client.start(RoundStart(round=1, cut=len(client.segment.span)))
    line = Channel(name, terms)

    def step() -> float:
        last = server.forward([line.up(client.forward())])[name]
        graded = client.head(line.down(last))
        at_cut = server.backward([line.up(graded)])[name]
        client.backward(line.down(at_cut))
        return graded.loss

    return step


def plain_step(
    model: Model,
    stream: BatchStream,
    loss_of: Callable[[Any, Batch], torch.Tensor],
    device: torch.device = CPU,
) -> Step:
    """Return a step of transformers + peft on the whole model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model.path, dtype=model.dtype).to(device)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    whole = get_peft_model(whole, LoraConfig(r=LORA.rank, lora_alpha=int(LORA.alpha), target_modules=targets))
    optimizer = torch.optim.AdamW(
        [p for p in whole.parameters() if p.requires_grad], lr=TRAINING.lr, weight_decay=0.0, fused=True
    )
    done = 0

    def step() -> float:
        nonlocal done
        loss = loss_of(whole, stream.batch(done).to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        return float(loss.detach())

    return step


def ordinary(whole: Any, batch: Batch) -> torch.Tensor:
    """Compute the loss with transformers: padded batch, mask, logits of all positions."""
    labels = torch.full_like(batch.tokens, -100)
    rows, columns = batch.positions()
    labels[rows, columns + 1] = batch.tokens[rows, columns + 1]  # transformers shifts them itself
    return whole(input_ids=batch.tokens, attention_mask=_mask(batch), labels=labels, use_cache=False).loss


def labelled_logits(whole: Any, batch: Batch) -> torch.Tensor:
    """Compute the loss from logits of labelled positions only."""
    return _loss(whole, _hidden(whole, input_ids=batch.tokens, attention_mask=_mask(batch)), batch)


def no_mask(whole: Any, batch: Batch) -> torch.Tensor:
    """Also omit the mask: causal attention never sees the padding, which is on the right."""
    return _loss(whole, _hidden(whole, input_ids=batch.tokens), batch)


def float32_attention(whole: Any, batch: Batch) -> torch.Tensor:
    """Also use our attention, whose backward pass is faster on a CPU."""
    train_in_float32(whole.get_base_model())  # the first call replaces it
    return no_mask(whole, batch)


def padding_free(whole: Any, batch: Batch) -> torch.Tensor:
    """Concatenate the sequences in one row instead of padding; position ids separate them."""
    real = _mask(batch).bool()
    positions = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)
    flat = _hidden(whole, input_ids=batch.tokens[real][None], position_ids=positions[real][None])
    hidden = flat.new_zeros(*real.shape, flat.shape[-1])
    hidden[real] = flat[0]
    return _loss(whole, hidden, batch)


PLAIN = {
    "plain": ordinary,
    "+ logits of labelled positions only": labelled_logits,
    "+ no mask": no_mask,
    "+ attention in float32": float32_attention,
    "plain, labelled logits, padding-free": padding_free,
}
BEST = "+ attention in float32"


def _hidden(whole: Any, **inputs: torch.Tensor) -> torch.Tensor:
    """Return the hidden states (B, T, D) after the final norm."""
    hidden: torch.Tensor = whole.get_base_model().model(**inputs, use_cache=False)[0]
    return hidden


def _loss(whole: Any, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    logits = whole.get_base_model().lm_head(hidden[batch.positions()])
    return functional.cross_entropy(logits.float(), batch.targets())


def _mask(batch: Batch) -> torch.Tensor:
    device = batch.tokens.device
    lengths = torch.tensor(batch.lengths, device=device)[:, None]
    return (torch.arange(batch.tokens.shape[1], device=device) < lengths).long()


def read_text(
    model: Model, path: Path, seed: int, batch: int = TRAINING.batch_size
) -> tuple[BatchStream, str]:
    """Return batches of E2E, or of the embedded text if E2E is not available, and the text's name."""
    if path.is_file():
        spec, what = DataSpec(source=str(path), prompt="mr", completion="ref"), f"E2E ({path.name})"
    else:
        spec, what = DataSpec(max_tokens=96), "python-docs (embedded)"
    text = tokenise(read_records(spec, None, seed), model.tokenizer(), spec.max_tokens, spec.separator)
    return BatchStream(text.examples, batch, None, seed, 0), what


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared/data/e2e/devset.csv")
    parser.add_argument("--dtype", default="auto", help="type of the frozen weights, as in model.dtype")
    parser.add_argument("--steps", type=int, default=16, help="measured steps of each variant")
    chosen = parser.parse_args()
    steps = 3 if chosen.quick else chosen.steps
    begin(chosen.seed, chosen.threads)
    model = open_model(ModelSpec(dtype=chosen.dtype))
    stream, what = read_text(model, chosen.data, chosen.seed)
    trains = {name: plain_step(model, stream, loss_of) for name, loss_of in PLAIN.items()}
    trains |= split_steps(model, stream, chosen.seed)
    losses: dict[str, list[float]] = {name: [] for name in trains}

    def recording(name: str) -> Callable[[], None]:
        return lambda: losses[name].append(trains[name]())

    seconds = interleaved({name: recording(name) for name in trains}, steps, warmup=2)
    batches = [stream.batch(step) for step in range(2, steps + 2)]
    tokens, padded, labelled = (
        sum(count(batch) for batch in batches)
        for count in (lambda b: sum(b.lengths), lambda b: b.tokens.numel(), lambda b: b.labelled_tokens)
    )
    rows = [
        (
            name,
            f"{Spread.of(spent).median:.3f}",
            ratio(spent, seconds["plain"]),
            ratio(spent, seconds[BEST]),
            f"{math.fsum(losses[name][-5:]) / len(losses[name][-5:]):.3f}",
        )
        for name, spent in seconds.items()
    ]
    met = {name: ratio(seconds[name], seconds["plain"]).median for name in trains if name.startswith("split")}
    verdict = "; ".join(
        f"{name}: {found:.3f}, {'met' if found <= GOAL else 'missed'}" for name, found in met.items()
    )
    print(
        section(
            "Step overhead",
            {
                "config": f"{model.spec.name}, {model.spec.dtype}, LoRA rank {LORA.rank} on attention, batch "
                f"{TRAINING.batch_size}, fused AdamW in all; {steps} interleaved steps each, 2 to warm up",
                "text": f"{what}: {tokens / steps:.0f} tokens a step ({padded / steps:.0f} padded), "
                f"{labelled / steps:.0f} with a label",
                "seed": chosen.seed,
                "spread": "median of the ratios of single steps on the same batch (middle half)",
                f"goal, at most {GOAL} times the plain step": verdict,
            },
            table(
                ("step", "seconds", "to plain", "to plain with all optimizations", "loss, last 5 steps"), rows
            ),
        )
    )


if __name__ == "__main__":
    main()
