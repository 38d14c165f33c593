"""What a run would cost at every cut, and what each controller would choose; trains nothing.

    RunConfig --gather--> text, machines --predict--> every client at every cut + every controller's choice

What is counted once, the machines with the sizes of their batches, is kept in the user's cache folder, so
that asking again takes no model and no text, and asking of other machines no text (`counted`).
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from splitft.cache import cache_folder, put
from splitft.config import RunConfig
from splitft.errors import ScheduleError
from splitft.model.quiet import silence_transformers
from splitft.run.counted import counted, digest_of
from splitft.run.cut_schedule import CutSchedule
from splitft.schedule.clock import client_round, simulate_round
from splitft.schedule.controllers import CONTROLLERS
from splitft.schedule.cost import LEGS, round_bytes, round_seconds
from splitft.schedule.memory import client_memory
from splitft.schedule.problem import feasible
from splitft.schedule.workload import ClientProfile, Fleet


@dataclass(frozen=True)
class CutPrice:
    """One client at one cut."""

    cut: int
    seconds: float
    """Of a round, if it never waits for others."""
    up_mb: float
    """Sent in a round, in MB (10^6 bytes)."""
    down_mb: float
    """Received in a round."""
    memory_gb: float
    """Peak memory of the client, in GB (10^9 bytes)."""
    fits: bool
    """Whether memory and the site's bounds allow it."""


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
    """What is missing if no cut fits, in words."""


@dataclass(frozen=True)
class Choice:
    """What one controller would do in the first round."""

    controller: str
    cuts: dict[str, int]
    round_seconds: float | None
    """Of a round on the simulated clock; None if it finds no cuts."""
    reason: str


@dataclass(frozen=True)
class RunPlan:
    """The whole prediction."""

    model: str
    blocks: int
    clients: tuple[ClientPlan, ...]
    choices: tuple[Choice, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def plan(config: RunConfig) -> RunPlan:
    """Predict. Raises what `gather` raises."""
    fleet = fleet_for(config)
    blocks = fleet.costs.sizes.blocks
    given = config.cuts or (1,) * len(fleet.clients)
    names = tuple(client.name for client in fleet.clients)
    current = dict(zip(names, given, strict=True))
    allowed = feasible(CutSchedule(config, fleet, names).situation(1, current))
    clients = tuple(
        ClientPlan(
            client.name,
            client.device.source,
            client.link.source,
            tuple(_price(fleet, client, cut, cut in allowed[client.name].cuts) for cut in range(1, blocks)),
            allowed[client.name].lack,
        )
        for client in fleet.clients
    )
    choices = tuple(_choice(config, fleet, controller) for controller in CONTROLLERS)
    return RunPlan(config.model.name, blocks, clients, choices)


def fleet_for(config: RunConfig) -> Fleet:
    """The machines of a run: as counted before, if nothing that they depend on has changed."""
    try:
        return _FLEET.validate_python(json.loads(_path(config).read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError, ScheduleError):
        pass  # not there, or of another version: count
    from splitft.model import open_model
    from splitft.run.fleet import fleet_of
    from splitft.run.one_place import in_one_place
    from splitft.run.setup import check_cuts, ranks_of

    here = in_one_place(config)
    with silence_transformers():
        model = open_model(config.model)
        check_cuts(here, model.shape.blocks)
        work = counted(config, model)
        ranks = ranks_of(here, model.shape.blocks, list(work))
        fleet = fleet_of(here, model, ranks, list(work), list(work.values()))
    # under the key as it is now: a machine that is `measured` has been calibrated meanwhile
    put(_path(config), json.dumps(_FLEET.dump_python(fleet)))
    return fleet


_FLEET = TypeAdapter(Fleet)


def _path(config: RunConfig) -> Path:
    """The file of these machines and batches, named by whatever they depend on."""
    sources = [Path(config.model.name), Path(config.model.name) / "config.json"]
    sources += sorted((cache_folder() / "calibrations").glob("*.json"))
    stamps = [(path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None for path in sources]
    code = [path.stat().st_mtime_ns for path in sorted(Path(__file__).parent.parent.glob("*/*.py"))]
    facts = (
        config.model_dump_json(), digest_of(Path(config.data.source)), stamps, code, platform.node(),
    )  # fmt: skip
    return cache_folder() / "fleets" / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:24]}.json"


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
    """The first round of the same run under another controller."""
    if controller == "fixed" and config.clients.cuts == "auto":
        return Choice(controller, {}, None, "clients.cuts is auto: nothing is given")
    schedule = config.schedule.model_copy(update={"controller": controller})
    try:
        pace, cuts = CutSchedule.begin(config.model_copy(update={"schedule": schedule}), fleet)
    except ScheduleError as error:
        return Choice(controller, {}, None, str(error))
    rounds = [
        client_round(fleet.costs, client, cuts[client.name]) for client in fleet.at(1) if client.name in cuts
    ]
    seconds = simulate_round(rounds, fleet.costs.server).round_s
    reason = "; ".join(pace.misfits) or pace.first.reason or "as given in clients.cuts"
    return Choice(controller, cuts, seconds, reason)
