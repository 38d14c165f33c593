"""From the run's configuration to one party of it: a site that has its text, or the server that has none.

    RunConfig, site's name --open_site--> its text in numbers (Hello), and its Client once the cut is known
    RunConfig, all Hellos  --open_server--> Server, pace, cuts

The server never reads text: what the schedule needs of it are means over batches, which the sites tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from splitft.assemble.defending import defence_of, public_text
from splitft.assemble.fleet import exact_sizes, fleet_of
from splitft.assemble.pace import Pace
from splitft.assemble.parties import gather
from splitft.assemble.quiet import quiet
from splitft.config import RunConfig
from splitft.data.text import BatchStream
from splitft.errors import DeployError
from splitft.geometry import Span
from splitft.model import Model, open_model
from splitft.protocol import Hello, Terms
from splitft.runtime import Client, Server
from splitft.runtime.ranks import Ranks
from splitft.tracking.events import ClientFacts

RULES = ("factors", "zero-pad", "svd")
"""Aggregation rules after which the global factors are all that a site must know."""
LEARNING = ("temporal", "principal")
"""Codecs whose two ends must remember the same."""
HEADER_BYTES = 2**21
"""Room for the headers of a message."""


@dataclass(frozen=True)
class Common:
    """What both sides know before a word is said."""

    config: RunConfig
    model: Model
    ranks: Ranks
    terms: Terms
    frame_limit: int
    """Longest message of this run, in bytes."""
    batch_tokens: int
    """Padded tokens of a batch, at most."""


@dataclass(frozen=True)
class SiteParty:
    """A site that is ready to say Hello."""

    common: Common
    hello: Hello
    open_client: Callable[[int], Client]
    """Its client at a cut; loads the blocks."""


@dataclass(frozen=True)
class ServerParty:
    """The server, ready for the first round of a link."""

    server: Server
    pace: Pace
    cuts: dict[str, int]
    facts: tuple[ClientFacts, ...]


def site_names(config: RunConfig) -> tuple[str, ...]:
    """All sites of the run, in the order of clients.cuts."""
    return config.deploy.sites or tuple(f"client-{n}" for n in range(1, config.clients.count + 1))


def common_of(config: RunConfig) -> Common:
    """Open the model. Raises DeployError if the run cannot be deployed."""
    if config.split.server_adapters == "shared":
        raise DeployError(
            "split.server_adapters: shared needs all clients in step, and a deployed run never waits for a "
            "site that is away; give per-client"
        )
    if config.aggregate.rule not in RULES:
        raise DeployError(
            f"aggregate.rule: a deployed run does not carry what {config.aggregate.rule} keeps beside the "
            f"factors yet; give {', '.join(RULES)}"
        )
    for found, what in (
        (config.clients.pooled, "clients.pooled: the text of all clients in one place"),
        (bool(config.lora.client_ranks), "lora.client_ranks"),
        (not config.aggregate.federated, "aggregate: a run without federation"),
        (config.training.order == "in-turn", "training.order: in-turn"),
    ):
        if found:
            raise DeployError(f"{what} is for simulation; a deployed run has no such thing yet")
    if config.wire.chooses:
        raise DeployError("wire: auto tries codecs on all clients' text in one place; name the codecs here")
    for role in ("hidden", "gradient", "adapter"):
        if (codec := str(getattr(config.wire, role))).startswith(LEARNING):
            raise DeployError(
                f"wire.{role}: {codec} learns on both ends of a line, and a site that comes back knows "
                "nothing of what was learnt; give another codec"
            )
    if config.privacy.private_blocks:
        raise DeployError(
            "privacy.private_blocks: a site of a deployed run keeps no blocks of its own from one link to "
            "the next yet; give 0"
        )
    model = open_model(config.model)
    ranks = Ranks(config.lora, model.shape.blocks, config.aggregate.rule, config.seed)
    return Common(
        config, model, ranks, terms_of(config, model), _frame_limit(config, model, ranks), most_rows(config)
    )


def open_site(config: RunConfig, name: str) -> SiteParty:
    """Read the site's text. Raises a SplitftError that says what to mend."""
    with quiet():
        common, gathered = common_of(config), gather(config)
    names = site_names(config)
    if name not in names:
        raise DeployError(f"{name} is no site of this run; it has {', '.join(names)} (deploy.sites)")
    own = gathered.clients[names.index(name)]
    sizes = own.stream.sizes()
    sequences = sum(one.sequences for one in sizes)
    hello = Hello(
        client=name,
        train_examples=own.facts.train_examples,
        train_tokens=own.facts.train_tokens,
        eval_examples=own.facts.eval_examples,
        truncated=own.facts.truncated,
        tokens_per_batch=sum(one.tokens for one in sizes) / len(sizes),
        labelled_per_batch=sum(one.labelled for one in sizes) / len(sizes),
        sequences_per_batch=sequences / len(sizes),
        padded_length=sum(one.sequences * one.longest for one in sizes) / sequences,
    )

    def open_client(cut: int) -> Client:
        with quiet():
            public = public_text(config, gathered.model)
            return Client(
                name,
                gathered.model,
                cut,
                config.split.labels,
                common.ranks,
                config.training,
                own.stream,
                own.held_out,
                defence_of(config, name, public, secret=True),
            )

    return SiteParty(common, hello, open_client)


def open_server(common: Common, hellos: Mapping[str, Hello]) -> ServerParty:
    """The server for the sites that have said Hello, in the order of the run's sites."""
    config = among(common.config, tuple(hellos))
    told = [cast(BatchStream, _Told(one)) for one in hellos.values()]
    with quiet():
        fleet = fleet_of(config, common.model, common.ranks, tuple(hellos), told)
        pace, cuts = Pace.begin(config, fleet)
        deepest = Span(min(cuts.values()), common.model.shape.blocks)
        server = Server(common.model, deepest, common.ranks, config.split, config.training)
    facts = tuple(
        ClientFacts(
            name=name,
            cut=cuts[name],
            train_examples=one.train_examples,
            train_tokens=one.train_tokens,
            eval_examples=one.eval_examples,
            truncated=one.truncated,
        )
        for name, one in hellos.items()
        if name in cuts
    )
    return ServerParty(server, pace, cuts, facts)


@dataclass(frozen=True)
class _Told:
    """A site's batches as the schedule counts them, from what the site told: one that is their mean."""

    hello: Hello

    def sizes(self) -> list[_MeanSize]:
        """One batch of mean size."""
        one = self.hello
        return [
            _MeanSize(
                one.sequences_per_batch, one.padded_length, one.tokens_per_batch, one.labelled_per_batch
            )
        ]


@dataclass(frozen=True)
class _MeanSize:
    """`BatchSize`, of a mean."""

    sequences: float
    longest: float
    tokens: float
    labelled: float


def terms_of(config: RunConfig, model: Model) -> Terms:
    """What both sides agree on."""
    return Terms(
        width=model.shape.width,
        dtype=model.dtype,
        adapter_dtype=torch.promote_types(model.dtype, torch.float32),
        wire=config.wire,
        labels_travel=config.split.labels == "server",
        most_rows=most_rows(config),
    )


def most_rows(config: RunConfig) -> int:
    """Padded tokens of the largest batch."""
    longest, training = config.data.max_tokens, config.training
    return max(longest, training.batch_tokens or training.batch_size * longest)


def among(config: RunConfig, names: Sequence[str]) -> RunConfig:
    """The configuration as it is for some of the run's sites."""
    places = [site_names(config).index(name) for name in names]

    def own(given: Any) -> Any:
        return tuple(given[place] for place in places) if isinstance(given, tuple) else given

    clients, schedule, deploy = config.clients, config.schedule, config.deploy
    return config.model_copy(
        update={
            "clients": clients.model_copy(update={"count": len(places), "cuts": own(clients.cuts)}),
            "schedule": schedule.model_copy(
                update={"devices": own(schedule.devices), "links": own(schedule.links), "changes": ()}
            ),
            "deploy": deploy.model_copy(update={"sites": tuple(names)}),
        }
    )


def _frame_limit(config: RunConfig, model: Model, ranks: Ranks) -> int:
    """A batch's hidden states, all adapters with their moments, in the widest type, and the headers."""
    batch = most_rows(config) * model.shape.width * 8
    adapter = config.lora.rank * exact_sizes(model, ranks).adapter_parameters_per_rank * model.shape.blocks
    return batch + 3 * 8 * adapter + HEADER_BYTES
