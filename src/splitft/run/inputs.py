"""Everything that a run knows before any client loads a block: model, text, its division, ranks.

    RunConfig, Model --divide_text--> DividedText(text, parts, names) --shares--> SharesReport
    RunConfig --gather--> RunInputs(config, model, ranks, text, clients)

`splitft shares` divides the text with the same function as `splitft train`, so it shows what a run uses.

With `clients.pooled` all text is in one place, which is the upper bound that federations are compared with.
One client takes the steps of all, so that as many examples are seen, and holds out what each client would
have held out, so that losses are comparable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from splitft.config import RunConfig
from splitft.data.corpora import read_records
from splitft.data.fingerprint import fingerprint, fingerprint_of_batches
from splitft.data.holdout import evaluation_part, held_out
from splitft.data.partitions import PARTITIONS, Shares, divide, owners_of
from splitft.data.share_statistics import ShareSummary, summarise_shares
from splitft.data.text import Batch, BatchStream, Example, eval_batches
from splitft.data.tokens import Tokenised, tokenise
from splitft.errors import ConfigError, GeometryError
from splitft.geometry import check_cut
from splitft.model import Model, open_model
from splitft.model.devices import RunDevices, take_devices
from splitft.model.source import silence_transformers
from splitft.run.fleet import fleet_of, workload_of
from splitft.schedule.workload import Fleet
from splitft.specs import DevicesSpec, SharesSpec
from splitft.tracking.events import ClientInfo
from splitft.training.ranks import RankPolicy

EVERYONE = "everyone"
"""Name of the one client of a pooled run."""


@dataclass(frozen=True)
class DividedText:
    """A corpus and its division among clients."""

    text: Tokenised
    """All examples."""
    parts: Shares
    """For each client the indices of its examples."""
    names: tuple[str, ...]
    """The clients' names in the run."""


@dataclass(frozen=True)
class SharesReport:
    """The division of a text as plain numbers."""

    source: str
    """`data.source`."""
    spec: SharesSpec
    """How the text was divided."""
    seed: int
    names: tuple[str, ...]
    """The clients' names in the run."""
    summary: ShareSummary
    truncated: int
    """Examples truncated to `data.max_tokens`."""
    dropped: int
    """Records without a token to learn."""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**asdict(self), "spec": self.spec.model_dump(mode="json")}


@dataclass(frozen=True)
class ClientText:
    """One client's share of the text."""

    name: str
    """The client's name in the run."""
    stream: BatchStream
    """Training batches."""
    held_out: tuple[Batch, ...]
    """Evaluation batches."""
    facts: ClientInfo
    """Both in numbers; the cut is not chosen yet (0)."""


@dataclass(frozen=True)
class RunInputs:
    """Model, text and ranks of a run, before any client loads a block."""

    config: RunConfig
    model: Model
    ranks: RankPolicy
    text: Tokenised
    clients: tuple[ClientText, ...]
    devices: RunDevices

    def fleet(self) -> Fleet:
        """Return the clients' machines, links and work."""
        names = [client.name for client in self.clients]
        work = [workload_of(self.config, client.stream) for client in self.clients]
        return fleet_of(self.config, self.model, self.ranks, names, work)


def divide_text(config: RunConfig, model: Model) -> DividedText:
    """Read the text and divide it among the clients. Raises DataError if there is none, or not enough."""
    spec = config.clients.shares
    records = read_records(config.data, spec.column, config.seed)
    text = tokenise(records, model.tokenizer(), config.data.max_tokens, config.data.separator)
    parts = divide(text.examples, config.clients.count, spec, config.seed)
    owned = PARTITIONS[spec.by].owns_text
    names = owners_of(text.examples) if owned else tuple(f"client-{n}" for n in range(1, len(parts) + 1))
    return DividedText(text, parts, names)


def shares(config: RunConfig) -> SharesReport:
    """Divide the text as a run would, and count; trains nothing. Raises what `divide_text` raises."""
    with silence_transformers():
        divided = divide_text(config, open_model(config.model))
    spec, text = config.clients.shares, divided.text
    bins = spec.classes if PARTITIONS[spec.by].by_length else SharesSpec().classes
    return SharesReport(
        source=config.data.source,
        spec=spec,
        seed=config.seed,
        names=divided.names,
        summary=summarise_shares(text.examples, divided.parts, bins),
        truncated=text.truncated,
        dropped=text.dropped,
    )


def gather(config: RunConfig, weights: bool = True) -> RunInputs:
    """Open the model, read the text and divide it; `weights` as in `open_model`.

    Raises a SplitftError that names the key to change if the configuration does not fit the model or text.
    """
    config = pooled_config(config)
    devices = take_devices(config.devices)
    model = open_model(config.model, devices.every, weights)
    check_cuts(config, model.shape.blocks)
    divided = divide_text(config, model)
    _check_length(divided.text, model)
    parts = [[divided.text.examples[index] for index in part] for part in divided.parts]
    if config.clients.pooled:
        clients: tuple[ClientText, ...] = (_client_text(config, EVERYONE, dict(enumerate(parts))),)
    else:
        clients = tuple(
            _client_text(config, name, {index: part})
            for index, (name, part) in enumerate(zip(divided.names, parts, strict=True))
        )
    ranks = ranks_of(config, model.shape.blocks, [client.name for client in clients])
    return RunInputs(config, model, ranks, divided.text, clients, devices)


def pooled_config(config: RunConfig) -> RunConfig:
    """Return the configuration for the one client of a pooled run: the steps of all, on the server's machine.

    A configuration with `clients.pooled: false` is returned unchanged.
    """
    if not config.clients.pooled:
        return config
    training, schedule = config.training, config.schedule
    steps = training.steps * config.clients.count
    machine = {"devices": schedule.server, "links": "lan", "changes": ()}
    return config.model_copy(update={
        "training": training.model_copy(update={"steps": steps, "participation": 1.0}),
        "schedule": schedule.model_copy(update=machine),
        "devices": DevicesSpec.everywhere(config.devices.server),
    })  # fmt: skip


def ranks_of(config: RunConfig, blocks: int, names: Sequence[str]) -> RankPolicy:
    """Return the rank policy of a run with these clients."""
    lora = config.lora
    by_client = {name: lora.rank_of(index) for index, name in enumerate(names)} if lora.client_ranks else {}
    return RankPolicy(lora, blocks, config.aggregate.rule, config.seed, by_client)


def check_cuts(config: RunConfig, blocks: int) -> None:
    """Raise GeometryError, naming the key, for cuts that the model does not have."""
    for index, cut in enumerate(config.cuts or ()):
        try:
            check_cut(cut, blocks, whole_allowed=config.split.labels == "client")
        except GeometryError as error:
            place = f"[{index}]" if isinstance(config.clients.cuts, tuple) else ""
            raise GeometryError(f"clients.cuts{place}: {error}") from error
    # the whole model on a client (max_cut L) needs its labels there
    schedule, whole = config.schedule, config.split.labels == "client"
    for key, bound, most in (
        ("min_cut", schedule.min_cut, blocks - 1),
        ("max_cut", schedule.max_cut, blocks if whole else blocks - 1),
    ):
        if bound is not None and bound > most:
            raise GeometryError(
                f"schedule.{key}: {bound} leaves the server no blocks: the model has {blocks}; "
                f"give at most {most}"
            )


def _check_length(text: Tokenised, model: Model) -> None:
    longest, most = max(map(len, text.examples)), model.shape.max_positions
    if longest > most:
        raise ConfigError(
            f"data.max_tokens: an example has {longest} tokens, but the model takes at most {most} "
            f"positions; give data.max_tokens={most} or less"
        )


def _client_text(config: RunConfig, name: str, parts: Mapping[int, Sequence[Example]]) -> ClientText:
    """Return what one client trains and is evaluated on; `parts` are shares of the text by their index.

    Each share is held out with the seed of its index, whoever trains on it.
    """
    training, data, seed = config.training, config.data, config.seed
    train: list[Example] = []
    batches: list[Batch] = []
    for index, part in parts.items():
        kept, out = held_out(part, data.holdout, seed, index)
        train += kept
        evaluated = evaluation_part(out, data.eval_part, data.eval_examples)
        batches += eval_batches(evaluated, training.batch_size, training.batch_tokens)
    facts = ClientInfo(
        name=name,
        cut=0,
        train_examples=len(train),
        train_tokens=sum(map(len, train)),
        eval_examples=sum(len(batch.lengths) for batch in batches),
        truncated=sum(example.truncated for part in parts.values() for example in part),
        trained_on=fingerprint(train),
        held_out=fingerprint_of_batches(batches),
    )
    stream = BatchStream(train, training.batch_size, training.batch_tokens, seed, min(parts))
    return ClientText(name, stream, tuple(batches), facts)
