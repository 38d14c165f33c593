"""From a configuration to the parties of a run: model, text, shares, clients, server.

    RunConfig --gather--> Gathered(model, text, shares) --prepare--> Prepared(server, clients, pace, ...)

Cuts come between the two: what a client trains on, on which machine, is known before its blocks are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from splitft.config import RunConfig
from splitft.data.fingerprint import fingerprint, fingerprint_of_batches
from splitft.data.text import Batch, BatchStream, eval_batches, held_out
from splitft.data.tokens import Tokenised
from splitft.errors import ConfigError, GeometryError
from splitft.geometry import Span, check_cut
from splitft.model import Model, open_model
from splitft.protocol import MessageSerializer
from splitft.protocol.channel import Tap
from splitft.run.codec_choice import choose_wires
from splitft.run.cut_schedule import CutSchedule
from splitft.run.defending import check_accountant, defence_of, privacy_of, public_text
from splitft.run.fleet import fleet_of, wire_costs, workload_of
from splitft.run.inputs import divide_text
from splitft.run.one_place import in_one_place, pooled
from splitft.run.terms import terms_of
from splitft.schedule.fleet import Fleet
from splitft.specs import WireSpec
from splitft.tracking.events import ClientFacts, WireChosen
from splitft.training import Client, RunState, Server, Simulation
from splitft.training.ranks import RankPolicy


@dataclass(frozen=True)
class ClientText:
    """One client's share of the text."""

    name: str
    """How the run calls the client."""
    stream: BatchStream
    """What it trains on."""
    held_out: tuple[Batch, ...]
    """What it is evaluated on."""
    facts: ClientFacts
    """Both in numbers; the cut is still to come (0)."""


@dataclass(frozen=True)
class RunInputs:
    """What is known before anyone holds a block."""

    config: RunConfig
    model: Model
    ranks: RankPolicy
    text: Tokenised
    clients: tuple[ClientText, ...]

    def fleet(self) -> Fleet:
        """The clients' machines and links."""
        names = [client.name for client in self.clients]
        work = [workload_of(self.config, client.stream) for client in self.clients]
        return fleet_of(self.config, self.model, self.ranks, names, work)


@dataclass(frozen=True)
class RunSetup:
    """All parties of a run, ready for their first round."""

    config: RunConfig
    model: Model
    ranks: RankPolicy
    server: Server
    clients: tuple[Client, ...]
    facts: tuple[ClientFacts, ...]
    text: Tokenised
    terms: MessageSerializer
    pace: CutSchedule
    """Who chooses the cuts, and the simulated clock."""
    wires: Mapping[str, WireSpec] = field(default_factory=dict)
    """Codecs of each client, where `wire: auto` has chosen."""
    chosen: tuple[WireChosen, ...] = ()
    """And why."""

    def terms_of(self, client: str) -> MessageSerializer:
        """What one client and the server agreed on."""
        return replace(self.terms, wire=self.wires.get(client, self.terms.wire))

    def simulation(self, tap: Tap | None = None) -> Simulation:
        """The parties on lines in this process."""
        terms = {client.name: self.terms_of(client.name) for client in self.clients}
        return Simulation(self.server, self.clients, terms, tap, self.config.seed)

    def initial(self) -> RunState:
        """Before round 1."""
        cuts = {facts.name: facts.cut for facts in self.facts}
        return RunState(0, cuts, self.server.initial())


def gather(config: RunConfig) -> RunInputs:
    """Open the model, read the text and divide it.

    Raises a SplitftError that names the key to mend if the configuration does not fit the model or the text.
    """
    config = in_one_place(config)
    model = open_model(config.model)
    check_cuts(config, model.shape.blocks)
    divided = divide_text(config, model)
    text = divided.text
    _check_length(text, model)
    if config.clients.pooled:
        shares = [[text.examples[place] for place in part] for part in divided.parts]
        stream, batches, facts = pooled(config, shares)
        clients: tuple[ClientText, ...] = (ClientText(facts.name, stream, tuple(batches), facts),)
    else:
        clients = tuple(
            _client_text(config, text, part, index, name)
            for index, (name, part) in enumerate(zip(divided.names, divided.parts, strict=True))
        )
    ranks = ranks_of(config, model.shape.blocks, [client.name for client in clients])
    return RunInputs(config, model, ranks, text, clients)


def ranks_of(config: RunConfig, blocks: int, names: Sequence[str]) -> RankPolicy:
    """The rank rule of a run with these clients."""
    lora = config.lora
    by_client = {name: lora.rank_of(index) for index, name in enumerate(names)} if lora.client_ranks else {}
    return RankPolicy(lora, blocks, config.aggregate.rule, config.seed, by_client)


def prepare(config: RunConfig, gathered: RunInputs | None = None) -> RunSetup:
    """Gather (unless that was done before), choose the first cuts, and set up every party.

    Raises what `gather` raises, and ScheduleError if a client fits at no cut.
    """
    check_accountant(config)
    gathered = gather(config) if gathered is None else gathered
    config = gathered.config
    model, ranks = gathered.model, gathered.ranks
    pace, cuts = CutSchedule.begin(config, gathered.fleet())
    here = [client for client in gathered.clients if client.name in cuts]
    labels, training = config.split.labels, config.training
    numbered = config.wire.hidden.startswith("temporal")
    public = public_text(config, model)
    defended = config.model_copy(update={"privacy": privacy_of(config, model.shape.blocks)})
    clients = tuple(
        Client(
            one.name,
            model,
            cuts[one.name],
            labels,
            ranks,
            training,
            one.stream,
            one.held_out,
            defence_of(defended, one.name, public),
            numbered,
        )
        for one in here
    )
    facts = tuple(one.facts.model_copy(update={"cut": cuts[one.name]}) for one in here)
    deepest = Span(min(cuts.values()), model.shape.blocks)
    server = Server(model, deepest, ranks, config.split, config.training)
    terms = terms_of(config, model)
    wires, chosen = choose_wires(clients, server, terms) if config.wire.chooses else ({}, ())
    pace.take_wires({name: wire_costs(wire, model.shape.width) for name, wire in wires.items()})
    return RunSetup(config, model, ranks, server, clients, facts, gathered.text, terms, pace, wires, chosen)


def check_cuts(config: RunConfig, blocks: int) -> None:
    """Raise GeometryError, naming the key, for cuts that the model does not have."""
    for index, cut in enumerate(config.cuts or ()):
        try:
            check_cut(cut, blocks, whole_allowed=False)
        except GeometryError as error:
            one = f"[{index}]" if isinstance(config.clients.cuts, tuple) else ""
            raise GeometryError(f"clients.cuts{one}: {error}") from error
    bounds = {"min_cut": config.schedule.min_cut, "max_cut": config.schedule.max_cut}
    for key, bound in bounds.items():
        if bound is not None and bound >= blocks:
            raise GeometryError(
                f"schedule.{key}: {bound} leaves the server no blocks: the model has {blocks}; "
                f"give at most {blocks - 1}"
            )


def _check_length(text: Tokenised, model: Model) -> None:
    longest, most = max(map(len, text.examples)), model.shape.max_positions
    if longest > most:
        raise ConfigError(
            f"data.max_tokens: an example has {longest} tokens, but the model takes {most} positions "
            f"at most; give data.max_tokens={most} or less"
        )


def _client_text(
    config: RunConfig, text: Tokenised, part: tuple[int, ...], index: int, name: str
) -> ClientText:
    training, data = config.training, config.data
    own = [text.examples[i] for i in part]
    to_train, kept_out = held_out(own, data.holdout, config.seed, index)
    stream = BatchStream(to_train, training.batch_size, training.batch_tokens, config.seed, index)
    batches = eval_batches(kept_out, training.batch_size, training.batch_tokens, data.eval_examples)
    facts = ClientFacts(
        name=name,
        cut=0,
        train_examples=len(to_train),
        train_tokens=sum(map(len, to_train)),
        eval_examples=sum(len(batch.lengths) for batch in batches),
        truncated=sum(example.truncated for example in own),
        trained_on=fingerprint(to_train),
        held_out=fingerprint_of_batches(batches),
    )
    return ClientText(name, stream, tuple(batches), facts)
