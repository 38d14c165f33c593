"""From the inputs of a run to its parties: server, clients with their defences, cuts and codecs.

    RunConfig --gather--> RunInputs --prepare--> RunSetup(server, clients, cut_schedule, serializer, ...)

Cuts are chosen before any client loads its blocks. In simulation a client's noise follows from the seed, so
that a run can be repeated; a real client passes `secret=True`, and its noise comes from the operating
system's entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from splitft.config import RunConfig
from splitft.data.corpora import read_records
from splitft.data.text import Batch
from splitft.data.tokens import Tokenised, tokenise
from splitft.errors import ConfigError
from splitft.geometry import Span
from splitft.model import Model
from splitft.model.devices import RunDevices
from splitft.model.precision import AUTO, AUTO_TYPES
from splitft.privacy.accounting import accountant_missing
from splitft.privacy.defence import Defence
from splitft.privacy.noise import Noise
from splitft.protocol import MessageSerializer
from splitft.protocol.channel import Tap
from splitft.run.codec_choice import choose_wires
from splitft.run.cut_schedule import CutSchedule
from splitft.run.fleet import wire_costs
from splitft.run.inputs import RunInputs, gather
from splitft.run.run_mode import settle
from splitft.specs import DataSpec, PrivacySpec, SiteBoundsSpec, WireSpec
from splitft.specs.rules import RULES
from splitft.tracking.events import ClientInfo, Listener, WireChosen
from splitft.training import Client, ClientSetup, FederatedTrainer, RunState, Server, Simulation
from splitft.training.parking import parking_on
from splitft.training.ranks import RankPolicy
from splitft.training.replicas import plan_replicas
from splitft.training.rounds import Federation, Schedule

PUBLIC_EXAMPLES, PUBLIC_TOKENS = 16, 64
"""Paragraphs of the embedded text, which everyone has, and their longest: enough for a median of norms."""


@dataclass(frozen=True)
class RunSetup:
    """All parties of a run, ready for their first round."""

    config: RunConfig
    model: Model
    ranks: RankPolicy
    server: Server
    clients: tuple[Client, ...]
    facts: tuple[ClientInfo, ...]
    text: Tokenised
    serializer: MessageSerializer
    cut_schedule: CutSchedule
    """The controller of the cuts, and the simulated clock."""
    wires: Mapping[str, WireSpec] = field(default_factory=dict)
    """Codecs of each client, where `wire: auto` has chosen."""
    chosen: tuple[WireChosen, ...] = ()
    """The reasons for these."""
    devices: RunDevices = field(default_factory=RunDevices)
    """The devices that compute."""

    def serializer_of(self, client: str) -> MessageSerializer:
        """Return the serializer for one client's codecs."""
        return replace(self.serializer, wire=self.wires.get(client, self.serializer.wire))

    def simulation(self, tap: Tap | None = None) -> Simulation:
        """Return the parties on channels in this process."""
        serializers = {client.name: self.serializer_of(client.name) for client in self.clients}
        order = self.cut_schedule.arrival_order
        return Simulation(self.server, self.clients, serializers, tap, self.config.seed, order)

    def trainer(
        self,
        federation: Federation,
        listener: Listener,
        save: Callable[[RunState], None] = lambda state: None,
        schedule: Schedule | None = None,
    ) -> FederatedTrainer:
        """Return the trainer of these parties; `schedule` replaces the run's own."""
        config, schedule = self.config, schedule or self.cut_schedule
        return FederatedTrainer(
            self.server, federation, self.ranks, config.training, schedule, listener, save,
            config.aggregate, config.privacy,
        )  # fmt: skip

    def initial(self) -> RunState:
        """Return the state before round 1."""
        cuts = {facts.name: facts.cut for facts in self.facts}
        return RunState(0, cuts, self.server.initial())


def prepare(config: RunConfig, inputs: RunInputs | None = None) -> RunSetup:
    """Gather the inputs (unless they are given), choose the first cuts, and set up every party.

    Raises what `gather` raises, and ScheduleError if a client fits at no cut.
    """
    check_accountant(config)
    inputs = gather(config) if inputs is None else inputs
    config, model, ranks = inputs.config, inputs.model, inputs.ranks
    config, fleet, why = settle(config, inputs.fleet())
    cut_schedule, cuts = CutSchedule.begin(config, fleet, split_only=config.wire.chooses)
    # clients
    texts = [client for client in inputs.clients if client.name in cuts]
    public = public_text(config, model)
    defended = config.model_copy(update={"privacy": privacy_of(config, model.shape.blocks)})
    parkings = {device: parking_on([device]) for device in inputs.devices.clients}
    clients = tuple(
        Client(
            one.name,
            model,
            cuts[one.name],
            ClientSetup(
                ranks,
                config.training,
                one.stream,
                one.held_out,
                config.split.labels,
                defence_of(defended, one.name, public),
                config.wire.needs_example_ids,
                inputs.devices.of_client(index),
                parkings[inputs.devices.of_client(index)],
            ),
        )
        for index, one in enumerate(texts)
    )
    facts = tuple(one.facts.model_copy(update={"cut": cuts[one.name]}) for one in texts)
    # server
    deepest = Span(min(cuts.values()), model.shape.blocks)
    tokens = {one.name: one.workload.padded_tokens for one in fleet.clients if one.name in cuts}
    places = plan_replicas(inputs.devices, tokens)
    server = Server(model, deepest, ranks, config.split, config.training, places)
    # codecs
    serializer = serializer_of(config, model)
    wires, chosen = choose_wires(clients, server, serializer) if config.wire.chooses else ({}, ())
    cut_schedule.set_wires({name: wire_costs(wire, model.shape.width) for name, wire in wires.items()})
    cut_schedule.choose_first(cuts, why)
    return RunSetup(
        config, model, ranks, server, clients, facts, inputs.text, serializer, cut_schedule, wires, chosen,
        inputs.devices,
    )  # fmt: skip


def serializer_of(config: RunConfig, model: Model) -> MessageSerializer:
    """Return the serializer of a run; client and server make equal ones from the same configuration.

    With `model.dtype: auto`, which only a deployed run has here, each computes in a type of its own.
    """
    return MessageSerializer(
        width=model.shape.width,
        dtype=model.hidden_dtype,
        other_types=AUTO_TYPES if config.model.dtype == AUTO else frozenset(),
        adapter_dtype=torch.promote_types(model.dtype, torch.float32),
        wire=config.wire,
        labels_travel=config.split.labels == "server",
        most_rows=most_rows(config),
        feedback=RULES[config.aggregate.rule].keeps_axes,
    )


def most_rows(config: RunConfig) -> int:
    """Return the padded tokens of the largest batch: one sequence may be longer than `batch_tokens`."""
    longest, training = config.data.max_tokens, config.training
    return max(longest, training.batch_tokens or training.batch_size * longest)


def defence_of(
    config: RunConfig,
    client: str,
    public: Batch | None,
    *,
    site: SiteBoundsSpec | None = None,
    secret: bool = False,
) -> Defence:
    """Return one client's defences; `site` raises what the run asks for, `secret` is for real deployments."""
    return Defence(config.privacy, Noise(config.seed, client, secret), public, site)


def privacy_of(config: RunConfig, blocks: int) -> PrivacySpec:
    """Return the clients' privacy: as configured, with all blocks private where nothing is aggregated."""
    if config.aggregate.federated:
        return config.privacy
    return config.privacy.model_copy(update={"private_blocks": blocks})


def public_text(config: RunConfig, model: Model, site: SiteBoundsSpec | None = None) -> Batch | None:
    """Return the text for public clipping norms, the same for every client; None if no norm needs it."""
    hidden = config.privacy.hidden
    defended = hidden.defence != "none" or (site is not None and site.min_noise > 0)
    if not defended or hidden.clip_norm != "public":
        return None
    records = read_records(DataSpec(source="python-docs", max_examples=PUBLIC_EXAMPLES))
    longest = min(PUBLIC_TOKENS, model.shape.max_positions)
    return Batch.of(tokenise(records, model.tokenizer(), longest).examples)


def check_accountant(config: RunConfig) -> None:
    """Raise ConfigError if noise is configured and the accountant of its privacy is not installed."""
    privacy = config.privacy
    noisy = privacy.hidden.noise or privacy.gradient.noise or privacy.updates.noise_multiplier
    if noisy and (missing := accountant_missing()):
        raise ConfigError(f"privacy: {missing}")
