"""From the run's configuration to one party of it: a site that has its text, or the server that has none.

    RunConfig, site's name --open_site--> its text in numbers (Hello), and its Client once the cut is known
    RunConfig, all Hellos  --open_server--> Server, pace, cuts

The server never reads text: what the schedule needs of it are means over batches, which the sites tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from splitft.config import RunConfig
from splitft.deploy.manifest import manifest_of
from splitft.deploy.site.policy import SitePolicy, at_site, refusals
from splitft.deploy.unsupported import check_deployable
from splitft.errors import DeployError, ForbiddenError
from splitft.geometry import Span
from splitft.model import Model, open_model
from splitft.model.quiet import silence_transformers
from splitft.protocol import BaseFile, MessageSerializer, Register
from splitft.run.cut_schedule import CutSchedule
from splitft.run.defending import defence_of, public_text
from splitft.run.fleet import exact_sizes, fleet_of, workload_of
from splitft.run.setup import gather, ranks_of
from splitft.run.terms import most_rows, terms_of
from splitft.schedule.memory import client_memory
from splitft.schedule.profile import GB, Device
from splitft.schedule.workload import Workload
from splitft.specs import DeviceSpec, SiteSpec
from splitft.tracking.events import ClientFacts
from splitft.training import Client, Server
from splitft.training.ranks import RankPolicy

HEADER_BYTES = 2**21
"""Room for the headers of a message."""
MOST_MEMORY_GB = 1e9
"""What a machine is said to have of which nobody said anything; no number of a machine is above it."""


@dataclass(frozen=True)
class Common:
    """What both sides know before a word is said."""

    config: RunConfig
    model: Model
    ranks: RankPolicy
    terms: MessageSerializer
    frame_limit: int
    """Longest message of this run, in bytes."""
    batch_tokens: int
    """Padded tokens of a batch, at most."""


@dataclass(frozen=True)
class SiteParty:
    """A site that is ready to say Hello."""

    common: Common
    hello: Register
    open_client: Callable[[int], Client]
    """Its client at a cut; loads the blocks."""
    guard: SitePolicy
    """What its data owner forbids."""


@dataclass(frozen=True)
class ServerParty:
    """The server, ready for the first round of a link."""

    server: Server
    pace: CutSchedule
    cuts: dict[str, int]
    facts: tuple[ClientFacts, ...]
    manifest: tuple[BaseFile, ...]
    """Files of the base model as they are here."""
    left_out: dict[str, str]
    """Sites that have said Hello and fit at no cut, and why."""


def site_names(config: RunConfig) -> tuple[str, ...]:
    """All sites of the run, in the order of clients.cuts."""
    return config.deploy.sites or tuple(f"client-{n}" for n in range(1, config.clients.count + 1))


def common_of(config: RunConfig) -> Common:
    """Open the model. Raises DeployError if the run cannot be deployed."""
    check_deployable(config)
    model = open_model(config.model)
    ranks = ranks_of(config, model.shape.blocks, site_names(config))
    return Common(
        config, model, ranks, terms_of(config, model), _frame_limit(config, model, ranks), most_rows(config)
    )


def open_site(config: RunConfig, name: str, site: SiteSpec | None = None) -> SiteParty:
    """Read the site's text. Raises a SplitftError that says what to mend.

    `site` is what its data owner fixes; raises ForbiddenError if the run asks for what that forbids.
    """
    names = site_names(config)
    if name not in names:
        raise DeployError(f"{name} is no site of this run; it has {', '.join(names)} (deploy.sites)")
    place = names.index(name)
    fixed = config.cuts[place] if config.cuts and config.schedule.controller == "fixed" else None
    if site is not None:
        if found := refusals(site, config, fixed):
            raise ForbiddenError("; ".join(found))
        if site.text.source is not None:
            config, place = among(config, (name,)), 0
        config = at_site(config, site)
    site = site or SiteSpec()
    with silence_transformers():
        common, gathered = common_of(config), gather(config)
        own = gathered.clients[place]
        work = workload_of(config, own.stream)
        machine, memory_at = _machine(config, name, common, work, site)
    guard = SitePolicy(site, common.model, config.split.labels == "client", memory_at)
    if fixed is None:
        guard.check_some_cut_fits()
    else:
        guard.check_memory(fixed)
    hello = Register(
        client=name,
        train_examples=own.facts.train_examples,
        train_tokens=own.facts.train_tokens,
        eval_examples=own.facts.eval_examples,
        truncated=own.facts.truncated,
        tokens_per_batch=work.tokens,
        labelled_per_batch=work.labelled_tokens,
        sequences_per_batch=work.sequences,
        padded_length=work.padded_length,
        min_cut=site.bounds.min_cut,
        device=machine,
    )

    def open_client(cut: int) -> Client:
        with silence_transformers():
            public = public_text(config, gathered.model, site.bounds)
            return Client(
                name,
                gathered.model,
                cut,
                config.split.labels,
                common.ranks,
                config.training,
                own.stream,
                own.held_out,
                defence_of(config, name, public, site=site.bounds, secret=True),
            )

    return SiteParty(common, hello, open_client, guard)


def _machine(
    config: RunConfig, name: str, common: Common, work: Workload, site: SiteSpec
) -> tuple[dict[str, float], Callable[[int], float]]:
    """This machine for the server's schedule, where its owner says something of it, and its memory by cut."""
    if site.machine.device is None and site.machine.memory_gb is None:
        return {}, lambda cut: 0.0
    one = among(config, (name,)) if len(site_names(config)) > 1 else config
    fleet = fleet_of(one, common.model, common.ranks, (name,), [work])
    client = fleet.clients[0]

    def memory_at(cut: int) -> float:
        return client_memory(fleet.costs, client, cut).total

    return _told(client.device, site.machine.memory_gb), memory_at


def _told(device: Device, budget_gb: float | None) -> dict[str, float]:
    """A machine in the numbers of `DeviceSpec`, with no more memory than its owner gives."""
    return {
        "block_forward_ms_per_token": device.block_forward_s_per_token * 1e3,
        "block_backward_ms_per_token": device.block_backward_s_per_token * 1e3,
        "head_ms_per_token": device.head_s_per_token * 1e3,
        "memory_gb": min(device.memory_bytes / GB, budget_gb or MOST_MEMORY_GB, MOST_MEMORY_GB),
        **({"block_overhead_ms": device.block_overhead_s * 1e3} if device.block_overhead_s else {}),
    }


def unfit(config: RunConfig, blocks: int, name: str, hello: Register) -> str | None:
    """Why a site that has said Hello cannot take part, if what it tells of itself rules it out."""
    try:
        machine = DeviceSpec.model_validate(hello.device) if hello.device else None
    except ValidationError as error:
        return f"it tells of a machine that cannot be: {error.errors()[0]['msg']}"
    if machine and max(machine.model_dump().values()) > MOST_MEMORY_GB:
        return f"it tells of a machine with numbers above {MOST_MEMORY_GB:g}"
    place = site_names(config).index(name)
    if config.cuts and config.schedule.controller == "fixed":
        deepest, key = config.cuts[place], "clients.cuts"
    else:
        deepest, key = config.schedule.max_cut or blocks - 1, "schedule.max_cut"
    if hello.min_cut <= deepest:
        return None
    return f"its data owner allows cuts from {hello.min_cut} on, and this run goes to {deepest} ({key})"


def open_server(common: Common, hellos: Mapping[str, Register]) -> ServerParty:
    """The server for the sites that have said Hello, in the order of the run's sites."""
    config = _as_told(among(common.config, tuple(hellos)), hellos)
    told = [_workload(config, one) for one in hellos.values()]
    with silence_transformers():
        fleet = fleet_of(config, common.model, common.ranks, tuple(hellos), told)
        pace, cuts = CutSchedule.begin(config, fleet, {name: one.min_cut for name, one in hellos.items()})
        manifest = manifest_of(common.model)
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
    left_out = dict(zip((name for name in hellos if name not in cuts), pace.left_out, strict=True))
    return ServerParty(server, pace, cuts, facts, manifest, left_out)


def _as_told(config: RunConfig, hellos: Mapping[str, Register]) -> RunConfig:
    """With the machines that data owners have told of; one that fits at no cut does not stop the others."""
    if not any(one.device for one in hellos.values()):
        return config
    given = config.schedule.devices
    assumed = given if isinstance(given, tuple) else (given,) * len(hellos)
    devices = tuple(
        DeviceSpec.model_validate(one.device) if one.device else device
        for one, device in zip(hellos.values(), assumed, strict=True)
    )
    schedule = config.schedule.model_copy(update={"devices": devices, "misfit": "leave-out"})
    return config.model_copy(update={"schedule": schedule})


def _workload(config: RunConfig, hello: Register) -> Workload:
    """A site's batches as the schedule counts them, from the means that the site told."""
    return Workload(
        tokens=hello.tokens_per_batch,
        labelled_tokens=hello.labelled_per_batch,
        sequences=hello.sequences_per_batch,
        padded_length=hello.padded_length,
        steps=config.training.steps,
        largest_tokens=hello.sequences_per_batch * hello.padded_length,
    )


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


def _frame_limit(config: RunConfig, model: Model, ranks: RankPolicy) -> int:
    """A batch's hidden states, all adapters with their moments, in the widest type, and the headers."""
    batch = most_rows(config) * model.shape.width * 8
    adapter = config.lora.rank * exact_sizes(model, ranks).adapter_parameters_per_rank * model.shape.blocks
    return batch + 3 * 8 * adapter + HEADER_BYTES
