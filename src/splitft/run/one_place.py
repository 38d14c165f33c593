"""All clients' text in one place, which is what federation is compared with from above.

    shares of all clients --each holds out what it would--> one stream, trained on the server's machine

The one who trains takes the steps of all, so that as many examples are seen as in a federation, and is
evaluated on what each client would hold out, so that the losses compare.
"""

from __future__ import annotations

from collections.abc import Sequence

from splitft.config import RunConfig
from splitft.data.fingerprint import fingerprint, fingerprint_of_batches
from splitft.data.text import Batch, BatchStream, Example, eval_batches, held_out
from splitft.tracking.events import ClientFacts

EVERYONE = "everyone"
"""How a run calls the one client that has all text."""


def in_one_place(config: RunConfig) -> RunConfig:
    """The configuration as its one client sees it: the steps of all, on the server's machine."""
    if not config.clients.pooled:
        return config
    training, schedule = config.training, config.schedule
    steps = training.steps * config.clients.count
    here = {"devices": schedule.server, "links": "lan", "changes": ()}
    return config.model_copy(update={
        "training": training.model_copy(update={"steps": steps, "participation": 1.0}),
        "schedule": schedule.model_copy(update=here),
    })  # fmt: skip


def pooled(
    config: RunConfig, shares: Sequence[Sequence[Example]]
) -> tuple[BatchStream, list[Batch], ClientFacts]:
    """What the one client trains on, what it is evaluated on, and both in numbers."""
    training, data, seed = config.training, config.data, config.seed
    to_train: list[Example] = []
    batches = []
    for index, own in enumerate(shares):
        kept, out = held_out(own, data.holdout, seed, index)
        to_train += kept
        batches += eval_batches(out, training.batch_size, training.batch_tokens, data.eval_examples)
    facts = ClientFacts(
        name=EVERYONE,
        cut=0,
        train_examples=len(to_train),
        train_tokens=sum(map(len, to_train)),
        eval_examples=sum(len(batch.lengths) for batch in batches),
        truncated=sum(example.truncated for own in shares for example in own),
        trained_on=fingerprint(to_train),
        held_out=fingerprint_of_batches(batches),
    )
    stream = BatchStream(to_train, training.batch_size, training.batch_tokens, seed, 0)
    return stream, batches, facts
