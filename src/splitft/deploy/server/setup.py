"""Set up the server of a deployed run from the registrations of its sites.

    RunTerms, a Register of each site --open_server--> ServerParty(server, cut schedule, cuts, manifest)

The server reads no text. The schedule needs means over batches, which the sites register.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import ValidationError

from splitft.config import RunConfig
from splitft.deploy.manifest import manifest_of
from splitft.deploy.run_terms import MAX_DEVICE_NUMBER, RunTerms, select_sites, site_names
from splitft.geometry import Span
from splitft.model.source import silence_transformers
from splitft.protocol import BaseFile, Register
from splitft.run.cut_schedule import CutSchedule
from splitft.run.fleet import fleet_of
from splitft.schedule.workload import Workload
from splitft.specs import DeviceSpec
from splitft.tracking.events import ClientInfo
from splitft.training import Server


@dataclass(frozen=True)
class ServerParty:
    """The server, ready for the first round of a session."""

    server: Server
    schedule: CutSchedule
    cuts: dict[str, int]
    facts: tuple[ClientInfo, ...]
    manifest: tuple[BaseFile, ...]
    """Files of the base model on this machine."""
    left_out: dict[str, str]
    """Registered sites that fit at no cut, and why."""


def unfit(config: RunConfig, blocks: int, name: str, register: Register) -> str | None:
    """Return why a registered site cannot take part; None if it can."""
    try:
        machine = DeviceSpec.model_validate(register.device) if register.device else None
    except ValidationError as error:
        return f"it describes a machine with invalid values: {error.errors()[0]['msg']}"
    if machine and max(machine.model_dump().values()) > MAX_DEVICE_NUMBER:
        return f"it describes a machine with numbers above {MAX_DEVICE_NUMBER:g}"
    if config.cuts and not config.schedule.adaptive:
        deepest, key = config.cuts[site_names(config).index(name)], "clients.cuts"
    else:
        deepest, key = config.schedule.max_cut or blocks - 1, "schedule.max_cut"
    if register.min_cut <= deepest:
        return None
    return f"its data owner allows cuts from {register.min_cut} on, and this run goes to {deepest} ({key})"


def open_server(terms: RunTerms, registered: Mapping[str, Register]) -> ServerParty:
    """Load the server for the registered sites, which are in the order of the run's sites."""
    config = _with_devices(select_sites(terms.config, tuple(registered)), registered)
    work = [_workload(config, one) for one in registered.values()]
    with silence_transformers():
        fleet = fleet_of(config, terms.model, terms.ranks, tuple(registered), work)
        min_cuts = {name: one.min_cut for name, one in registered.items()}
        schedule, cuts = CutSchedule.begin(config, fleet, min_cuts)
        manifest = manifest_of(terms.model)
        deepest = Span(min(cuts.values()), terms.model.shape.blocks)
        server = Server(terms.model, deepest, terms.ranks, config.split, config.training)
    facts = tuple(
        ClientInfo(
            name=name,
            cut=cuts[name],
            train_examples=one.train_examples,
            train_tokens=one.train_tokens,
            eval_examples=one.eval_examples,
            truncated=one.truncated,
        )
        for name, one in registered.items()
        if name in cuts
    )
    without_cut = [name for name in registered if name not in cuts]
    left_out = dict(zip(without_cut, schedule.left_out, strict=True))
    return ServerParty(server, schedule, cuts, facts, manifest, left_out)


def _with_devices(config: RunConfig, registered: Mapping[str, Register]) -> RunConfig:
    """Take the machines that data owners describe; one that fits at no cut does not stop the others."""
    if not any(one.device for one in registered.values()):
        return config
    given = config.schedule.devices
    assumed = given if isinstance(given, tuple) else (given,) * len(registered)
    devices = tuple(
        DeviceSpec.model_validate(one.device) if one.device else device
        for one, device in zip(registered.values(), assumed, strict=True)
    )
    schedule = config.schedule.model_copy(update={"devices": devices, "misfit": "leave-out"})
    return config.model_copy(update={"schedule": schedule})


def _workload(config: RunConfig, register: Register) -> Workload:
    """Return a site's batches as the schedule counts them, from the registered means."""
    return Workload(
        tokens=register.tokens_per_batch,
        labelled_tokens=register.labelled_per_batch,
        sequences=register.sequences_per_batch,
        padded_length=register.padded_length,
        steps=config.training.steps,
        largest_tokens=register.sequences_per_batch * register.padded_length,
    )
