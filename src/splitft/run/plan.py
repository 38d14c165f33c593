"""Predict what a run would cost at every cut, and what each controller would choose; train nothing.

    RunConfig --> machines, batch sizes --predict--> every client at every cut + every controller's choice

Reading and tokenising text takes seconds, and users plan again and again with other machines, links or cuts.
So two results are kept in the user's cache folder: batch sizes, which depend on text, tokenizer and division,
and the whole fleet, which depends on everything. The keys contain hashes of the files' content. A model whose
weights or tokenizer are elsewhere is planned too (`run.paper_plan`).
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter

from splitft.cache import KeyedCache, cache_folder, file_digest
from splitft.config import RunConfig
from splitft.errors import ScheduleError
from splitft.model.source import silence_transformers
from splitft.run.alternatives import Alternative, alternatives
from splitft.run.cut_schedule import CutSchedule
from splitft.run.paper_plan import assumed_work, assumption, lacks_tokenizer, needs_weights
from splitft.schedule.clock import client_round, simulate_round
from splitft.schedule.controllers import CONTROLLERS
from splitft.schedule.cost import LEGS, round_bytes, round_seconds
from splitft.schedule.memory import client_memory
from splitft.schedule.problem import feasible
from splitft.schedule.workload import ClientProfile, Fleet, Workload
from splitft.specs.data import EMBEDDED

if TYPE_CHECKING:  # a plan from the cache opens no model
    from splitft.model import Model

T = TypeVar("T")

DEVICE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
"""Environment variables that decide which devices and instructions torch finds."""


@dataclass(frozen=True)
class CutPrice:
    """One client at one cut."""

    cut: int
    seconds: float
    """Seconds of a round, if it never waits for others."""
    up_mb: float
    """Sent in a round, in MB (10^6 bytes)."""
    down_mb: float
    """Received in a round."""
    memory_gb: float
    """Peak memory of the client, in GB (10^9 bytes)."""
    fits: bool
    """True if memory and the site's bounds allow it."""


@dataclass(frozen=True)
class ClientPlan:
    """One client at every cut."""

    name: str
    device: str
    """Its machine, in words."""
    link: str
    """Its connection, in words."""
    prices: tuple[CutPrice, ...]
    lack: str
    """The resource that is missing if no cut fits, in words."""


@dataclass(frozen=True)
class Choice:
    """The cuts of one controller in the first round."""

    controller: str
    cuts: dict[str, int]
    round_seconds: float | None
    """Seconds of a round on the simulated clock; None if it finds no cuts."""
    reason: str


@dataclass(frozen=True)
class RunPlan:
    """The whole prediction."""

    model: str
    blocks: int
    clients: tuple[ClientPlan, ...]
    choices: tuple[Choice, ...]
    alternatives: tuple[Alternative, ...] = ()
    """The choice of `quickest`, and the methods of the field on the same clients."""
    assumption: str = ""
    """What is assumed instead of counted, in words; "" for nothing."""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


def plan(config: RunConfig) -> RunPlan:
    """Predict a run. Raises what `gather` raises."""
    fleet = fleet_for(config)
    blocks = fleet.costs.sizes.blocks
    given = config.cuts or (1,) * len(fleet.clients)
    names = tuple(client.name for client in fleet.clients)
    current = dict(zip(names, given, strict=True))
    schedule = CutSchedule(config, fleet, names)
    problem = schedule.problem(1, current)
    deepest = max(blocks - 1, schedule.max_cut, *given)  # all blocks on a client, if it is given them
    allowed = feasible(
        replace(problem, clients=tuple(replace(one, max_cut=deepest) for one in problem.clients))
        if deepest in given
        else problem
    )
    shown = range(1, deepest + 1)
    clients = tuple(
        ClientPlan(
            client.name,
            client.device.source,
            client.link.source,
            tuple(_price(fleet, client, cut, cut in allowed[client.name].cuts) for cut in shown),
            allowed[client.name].lack,
        )
        for client in fleet.clients
    )
    choices = tuple(_choice(config, fleet, controller) for controller in CONTROLLERS)
    compared = alternatives(config, fleet)
    return RunPlan(config.model.name, blocks, clients, choices, compared, assumption(config))


def fleet_for(config: RunConfig) -> Fleet:
    """Return the machines, links and batch sizes of a run, from the cache if nothing has changed."""
    cache, cacheable = _json_cache("fleets", Fleet), _has_known_text(config)
    if cacheable and (found := cache.find(_fleet_facts(config))) is not None:
        return found
    from splitft.model import open_model
    from splitft.model.devices import take_devices
    from splitft.run.fleet import fleet_of
    from splitft.run.inputs import check_cuts, pooled_config, ranks_of

    effective = pooled_config(config)
    with silence_transformers():
        model = open_model(config.model, take_devices(config.devices).every, needs_weights(config))
        check_cuts(effective, model.shape.blocks)
        work = _workloads(config, model)
        ranks = ranks_of(effective, model.shape.blocks, list(work))
        fleet = fleet_of(effective, model, ranks, list(work), list(work.values()))
    # facts anew: a machine that is `measured` has been calibrated meanwhile
    if cacheable:
        cache.put(_fleet_facts(config), fleet)
    return fleet


def _has_known_text(config: RunConfig) -> bool:
    """Return whether name or file identify the text; the rows of a plug-in's source may change."""
    return config.data.source_name in (None, *EMBEDDED) and not lacks_tokenizer(config)


def _workloads(config: RunConfig, model: Model) -> dict[str, Workload]:
    """Return each client's work in a round, from the cache if text and division are the same."""
    from splitft.run import inputs
    from splitft.run.fleet import workload_of

    def count() -> dict[str, Workload]:
        gathered = inputs.gather(config, needs_weights(config))
        return {client.name: workload_of(gathered.config, client.stream) for client in gathered.clients}

    cache = _json_cache("counts", dict[str, Workload])
    if lacks_tokenizer(config):
        return assumed_work(config)
    found = cache.cached(_count_facts(config, model), count) if _has_known_text(config) else count()
    steps = inputs.pooled_config(config).training.steps
    return {name: replace(workload, steps=steps) for name, workload in found.items()}


def _json_cache(folder: str, kind: type[T]) -> KeyedCache[T]:
    """Return a cache of dataclasses as JSON, with infinities as Python writes them."""
    adapter = TypeAdapter(kind)
    return KeyedCache(
        cache_folder() / folder,
        dump=lambda value: json.dumps(adapter.dump_python(value)).encode(),
        load=lambda data: adapter.validate_python(json.loads(data)),
    )


def _fleet_facts(config: RunConfig) -> tuple[object, ...]:
    """Return everything that a fleet depends on."""
    sources = [Path(config.model.name), Path(config.model.name) / "config.json"]
    for measured in ("calibrations", "precision"):
        sources += sorted((cache_folder() / measured).glob("*.json"))
    stamps = [(path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None for path in sources]
    text = file_digest(Path(config.data.source))
    machine = platform.node(), [os.environ.get(name) for name in DEVICE_VARIABLES]
    return config.model_dump_json(), text, stamps, _code_stamps("*/*.py"), machine


def _count_facts(config: RunConfig, model: Model) -> tuple[object, ...]:
    """Return everything that batch sizes depend on."""
    return (
        config.data.model_dump_json(), file_digest(Path(config.data.source)), platform.python_version(),
        model.path, [file_digest(path) for path in sorted(Path(model.path).glob("*token*"))],
        model.shape.max_positions,
        config.clients.model_dump_json(exclude={"cuts"}), [one.sha256 for one in config.plugins], config.seed,
        config.training.batch_size, config.training.batch_tokens, _code_stamps("data/*.py"),
    )  # fmt: skip


def _code_stamps(pattern: str) -> list[int]:
    return [path.stat().st_mtime_ns for path in sorted(Path(__file__).parent.parent.glob(pattern))]


def _price(fleet: Fleet, client: ClientProfile, cut: int, fits: bool) -> CutPrice:
    sent = round_bytes(fleet.costs, client, cut)
    by_way = {way: sum(n for leg, n in sent.items() if LEGS[leg] == way) for way in ("up", "down")}
    return CutPrice(
        cut=cut,
        seconds=sum(round_seconds(fleet.costs, client, cut).values()),
        up_mb=by_way["up"] / 1e6,
        down_mb=by_way["down"] / 1e6,
        memory_gb=client_memory(fleet.costs, client, cut).total / 1e9,
        fits=fits,
    )


def _choice(config: RunConfig, fleet: Fleet, controller: str) -> Choice:
    """Return the first round of the same run under another controller."""
    if not CONTROLLERS[controller].adaptive and config.clients.cuts == "auto":
        return Choice(controller, {}, None, "clients.cuts is auto: nothing is given")
    schedule = config.schedule.model_copy(update={"controller": controller})
    try:
        chosen, cuts = CutSchedule.begin(config.model_copy(update={"schedule": schedule}), fleet)
    except ScheduleError as error:
        return Choice(controller, {}, None, str(error))
    rounds = [
        client_round(fleet.costs, client, cuts[client.name]) for client in fleet.at(1) if client.name in cuts
    ]
    seconds = simulate_round(rounds, fleet.costs.server).round_s
    reason = "; ".join(chosen.misfits) or chosen.first.reason or "as given in clients.cuts"
    return Choice(controller, cuts, seconds, reason)
