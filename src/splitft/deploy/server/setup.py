"""Set up the server of a deployed run from the registrations of its sites.

    RunTerms, a Register of each site --open_server--> ServerParty(server, cut schedule, cuts, manifest)

The server reads no text. The schedule needs means over batches, which the sites register.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from splitft.config import RunConfig
from splitft.deploy.manifest import manifest_of, tensors_of
from splitft.deploy.run_terms import RunTerms, select_sites
from splitft.errors import ScheduleError
from splitft.geometry import Span
from splitft.model.source import silence_transformers
from splitft.protocol import BaseFile, BaseTensor, Register
from splitft.run.cut_schedule import CutSchedule
from splitft.run.fleet import fleet_of
from splitft.schedule.workload import Workload
from splitft.specs import DeviceSpec, DevicesSpec
from splitft.tracking.events import ClientInfo
from splitft.training import Server
from splitft.training.replicas import plan_replicas

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerParty:
    """The server, ready for the first round of a session."""

    server: Server
    schedule: CutSchedule
    cuts: dict[str, int]
    facts: tuple[ClientInfo, ...]
    manifest: tuple[BaseFile, ...]
    """Files of the base model on this machine."""
    tensors: tuple[BaseTensor, ...]
    """Tensors of the base model on this machine."""
    left_out: dict[str, str]
    """Registered sites for which there is no cut, and why."""


def open_server(terms: RunTerms, registered: Mapping[str, Register]) -> ServerParty:
    """Load the server for the registered sites, which are in the order of the run's sites.

    Sites that fit at no cut, or with which no cuts of all can be found, are left out.
    """
    with silence_transformers():
        plan, left_out = _plan_together(terms, registered)
        manifest, tensors = manifest_of(terms.model), tensors_of(terms.model)
        deepest = Span(min(plan.cuts.values()), terms.model.shape.blocks)
        split, training = plan.config.split, plan.config.training
        tokens = {name: _needs(registered[name]) for name in plan.cuts}
        places = plan_replicas(terms.devices, tokens)
        server = Server(terms.model, deepest, terms.ranks, split, training, places)
    facts = tuple(
        ClientInfo(
            name=name,
            cut=plan.cuts[name],
            train_examples=one.train_examples,
            train_tokens=one.train_tokens,
            eval_examples=one.eval_examples,
            truncated=one.truncated,
        )
        for name, one in registered.items()
        if name in plan.cuts
    )
    return ServerParty(server, plan.schedule, plan.cuts, facts, manifest, tensors, left_out)


@dataclass(frozen=True)
class _Plan:
    """The schedule of some sites, with its first cuts."""

    config: RunConfig
    schedule: CutSchedule
    cuts: dict[str, int]

    def left_out(self, registered: Mapping[str, Register]) -> dict[str, str]:
        """Return the sites that fit at no cut, and why."""
        without_cut = [name for name in registered if name not in self.cuts]
        return dict(zip(without_cut, self.schedule.left_out, strict=True))


def _plan_together(terms: RunTerms, registered: Mapping[str, Register]) -> tuple[_Plan, dict[str, str]]:
    """Plan for all sites, or without those that stand in the way; returns these with the reasons.

    Raises ScheduleError if the run cannot be planned with any site.
    """
    try:
        plan = _plan(terms, registered)
        return plan, plan.left_out(registered)
    except ScheduleError as error:
        if len(registered) == 1:
            raise
        reason = error
    # add one site after another, those that need least first
    admitted: dict[str, Register] = {}
    best: _Plan | None = None
    refused: dict[str, str] = {}
    for name in sorted(registered, key=lambda name: (_needs(registered[name]), name)):
        candidates = {one: registered[one] for one in registered if one in admitted or one == name}
        try:
            best = _plan(terms, candidates)
            admitted = candidates
        except ScheduleError as error:
            refused[name] = f"the run cannot be planned with it: {error}"
            logger.warning("%s is left out: %s", name, refused[name])
    if best is None:
        raise reason
    return best, {**best.left_out(admitted), **refused}


def _plan(terms: RunTerms, registered: Mapping[str, Register]) -> _Plan:
    """Choose the first cuts of these sites. Raises ScheduleError if there are none."""
    config = _with_devices(select_sites(terms.config, tuple(registered)), registered)
    here = DevicesSpec.everywhere(config.devices.server)  # where `measured` is measured
    config = config.model_copy(update={"devices": here})
    work = [_workload(config, one) for one in registered.values()]
    fleet = fleet_of(config, terms.model, terms.ranks, tuple(registered), work)
    min_cuts = {name: one.min_cut for name, one in registered.items()}
    schedule, cuts = CutSchedule.begin(config, fleet, min_cuts)
    return _Plan(config, schedule, cuts)


def _needs(register: Register) -> float:
    """Return the padded tokens of a site's batch, which decide the memory that the server needs for it."""
    return register.sequences_per_batch * register.padded_length


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
