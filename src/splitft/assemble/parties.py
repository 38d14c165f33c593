"""From a configuration to the parties of a run: model, text, shares, clients, server.

RunConfig --prepare--> Prepared(model, server, clients, ...) --simulation--> all in this process
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from splitft.config import RunConfig
from splitft.data.corpora import read_records
from splitft.data.shares import divide, values_of
from splitft.data.text import BatchStream, Example, eval_batches, held_out
from splitft.data.tokens import Tokenised, tokenise
from splitft.errors import ConfigError, GeometryError
from splitft.geometry import Span, check_cut
from splitft.model import Model, open_model
from splitft.protocol import Terms
from splitft.runtime import Client, RunState, Server, Simulation
from splitft.runtime.line import Tap
from splitft.runtime.ranks import Ranks
from splitft.tracking.events import ClientFacts


@dataclass(frozen=True)
class Prepared:
    """All parties of a run, ready for their first round."""

    config: RunConfig
    model: Model
    ranks: Ranks
    server: Server
    clients: tuple[Client, ...]
    facts: tuple[ClientFacts, ...]
    text: Tokenised
    terms: Terms

    def simulation(self, tap: Tap | None = None) -> Simulation:
        """The parties on lines in this process."""
        return Simulation(self.server, self.clients, self.terms, tap)

    def initial(self) -> RunState:
        """Before round 1."""
        cuts = {facts.name: facts.cut for facts in self.facts}
        return RunState(0, cuts, self.server.initial())


def prepare(config: RunConfig) -> Prepared:
    """Read model and text, divide it, and set up every party.

    Raises a SplitftError that names the key to mend if the configuration does not fit the model or the text.
    """
    model = open_model(config.model)
    blocks = model.shape.blocks
    cuts = _cuts(config, blocks)
    shares = config.clients.shares
    column = shares.column if shares.by in ("label", "natural") else None
    records = read_records(config.data, column, config.seed)
    text = tokenise(records, model.tokenizer(), config.data.max_tokens, config.data.separator)
    _check_length(text, model)
    parts = divide(text.examples, config.clients.count, shares, config.seed)
    ranks = Ranks(config.lora, blocks, config.aggregate.rule, config.seed)
    names = values_of(text.examples) if shares.by == "natural" else None
    clients, facts = [], []
    for index, (part, cut) in enumerate(zip(parts, cuts, strict=True)):
        name = names[index] if names else f"client-{index + 1}"
        own = [text.examples[i] for i in part]
        client, fact = _client(config, model, ranks, name, index, cut, own)
        clients.append(client)
        facts.append(fact)
    server = Server(model, Span(min(cuts), blocks), ranks, config.split, config.training)
    terms = Terms(
        width=model.shape.width,
        dtype=model.dtype,
        adapter_dtype=torch.promote_types(model.dtype, torch.float32),
        wire=config.wire,
        labels_travel=config.split.labels == "server",
    )
    return Prepared(config, model, ranks, server, tuple(clients), tuple(facts), text, terms)


def _cuts(config: RunConfig, blocks: int) -> tuple[int, ...]:
    cuts = config.cuts
    assert cuts is not None  # the configuration refuses `auto` without a controller that decides
    for index, cut in enumerate(cuts):
        try:
            check_cut(cut, blocks, whole_allowed=False)
        except GeometryError as error:
            one = f"[{index}]" if isinstance(config.clients.cuts, tuple) else ""
            raise GeometryError(f"clients.cuts{one}: {error}") from error
    return cuts


def _check_length(text: Tokenised, model: Model) -> None:
    longest, most = max(map(len, text.examples)), model.shape.max_positions
    if longest > most:
        raise ConfigError(
            f"data.max_tokens: an example has {longest} tokens, but the model takes {most} positions "
            f"at most; give data.max_tokens={most} or less"
        )


def _client(
    config: RunConfig, model: Model, ranks: Ranks, name: str, index: int, cut: int, own: list[Example]
) -> tuple[Client, ClientFacts]:
    training, data = config.training, config.data
    to_train, kept_out = held_out(own, data.holdout, config.seed, index)
    stream = BatchStream(to_train, training.batch_size, training.batch_tokens, config.seed, index)
    batches = eval_batches(kept_out, training.batch_size, training.batch_tokens, data.eval_examples)
    client = Client(name, model, cut, config.split.labels, ranks, training, stream, batches)
    facts = ClientFacts(
        name=name,
        cut=cut,
        train_examples=len(to_train),
        train_tokens=sum(map(len, to_train)),
        eval_examples=sum(len(batch.lengths) for batch in batches),
        truncated=sum(example.truncated for example in own),
    )
    return client, facts
