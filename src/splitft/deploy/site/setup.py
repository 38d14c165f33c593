"""Set up one site of a deployed run: its text as counts for the server, and its client once the cut is known.

RunConfig, site's name, SiteSpec --open_site--> SiteParty(register, open_client, policy)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from splitft.config import RunConfig
from splitft.deploy.run_terms import MAX_DEVICE_NUMBER, RunTerms, load_run_terms, select_sites, site_names
from splitft.deploy.site.limits import OrderLimits, WorkLedger
from splitft.deploy.site.policy import SitePolicy, at_site, candidates_of, refusals
from splitft.errors import DeployError, ForbiddenError
from splitft.model.devices import find_device
from splitft.model.source import silence_transformers
from splitft.protocol import Register
from splitft.run.codec_choice import Candidates
from splitft.run.fleet import fleet_of, workload_of
from splitft.run.inputs import gather
from splitft.run.setup import defence_of, public_text
from splitft.schedule.memory import client_memory
from splitft.schedule.profile import GB, Device
from splitft.schedule.workload import Workload
from splitft.specs import DevicesSpec, SiteSpec
from splitft.training import Client
from splitft.training.client import ClientSetup

MB = 1e6


@dataclass(frozen=True)
class SiteParty:
    """A site that is ready to register with the server."""

    terms: RunTerms
    register: Register
    open_client: Callable[[int], Client]
    """Makes the client at a cut, and loads its blocks."""
    policy: SitePolicy
    """What the data owner forbids."""
    text: str = ""
    """Fingerprint of the site's text, which stays here."""
    candidates: Candidates = Candidates()  # noqa: RUF009 frozen
    """Codecs that the site may choose."""


def open_site(
    config: RunConfig, name: str, site: SiteSpec | None = None, ledger: WorkLedger | None = None
) -> SiteParty:
    """Read the site's text. Raises a SplitftError that says what to correct.

    `site` is the data owner's file, `ledger` what the site has done so far. Raises ForbiddenError if the run
    asks for what the file forbids, or if the hours of today are spent.
    """
    began = time.monotonic()
    names = site_names(config)
    if name not in names:
        raise DeployError(f"{name} is no site of this run; it has {', '.join(names)} (deploy.sites)")
    index = names.index(name)
    fixed_cut = fixed_cut_of(config, index)

    # the data owner's file: refuse before anything is read, then take its text and machine
    if site is not None:
        if found := refusals(site, config, fixed_cut):
            raise ForbiddenError("; ".join(found))
        find_device(site.machine.runs_on, "machine.runs_on")  # raises ConfigError
        if site.text.source is not None:
            config, index = select_sites(config, (name,)), 0
        config = at_site(config, site)
    else:  # a site computes where it chooses, not where the run's simulation would
        config = config.model_copy(update={"devices": DevicesSpec()})
    site = site or SiteSpec()
    limits = OrderLimits(site.limits, config.training, ledger)
    limits.check_day()

    # the text, in numbers
    with silence_transformers():
        terms, inputs = load_run_terms(config), gather(config)
        terms = replace(terms, frame_limit=min(terms.frame_limit, int(site.limits.frame_mb * MB)))
        own = inputs.clients[index]
        work = workload_of(config, own.stream)
        device, memory_at = _machine(terms, name, work, site)
    if config.clients.cuts == "whole":
        fixed_cut = terms.model.shape.blocks
    policy = SitePolicy(site, terms.model, config.split.labels == "client", memory_at, limits)
    if fixed_cut is None:
        policy.check_some_cut_fits()
    else:
        policy.check_memory(fixed_cut)
    register = Register(
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
        device=device,
    )

    def open_client(cut: int) -> Client:
        with silence_transformers():
            public = public_text(config, inputs.model, site.bounds)
            defence = defence_of(config, name, public, site=site.bounds, secret=True)
            setup = ClientSetup(
                terms.ranks,
                config.training,
                own.stream,
                own.held_out,
                config.split.labels,
                defence,
                numbered=config.wire.needs_example_ids,
                device=terms.devices.of_client(0),
            )
            return Client(name, inputs.model, cut, setup)

    limits.work(time.monotonic() - began)
    text = f"{own.facts.trained_on} {own.facts.held_out}"
    return SiteParty(terms, register, open_client, policy, text, candidates_of(site, config))


def fixed_cut_of(config: RunConfig, index: int) -> int | None:
    """Return the cut of a site by its number; None if the controller chooses it, or all blocks are meant."""
    return config.cuts[index] if config.cuts and not config.schedule.adaptive else None


def _machine(
    terms: RunTerms, name: str, work: Workload, site: SiteSpec
) -> tuple[dict[str, float], Callable[[int], float]]:
    """Return this machine as the server is told of it, if the data owner describes it, and bytes by cut."""
    if site.machine.device is None and site.machine.memory_gb is None:
        return {}, lambda cut: 0.0
    device, memory_at = memory_by_cut(terms, name, work)
    return _device_numbers(device, site.machine.memory_gb), memory_at


def memory_by_cut(terms: RunTerms, name: str, work: Workload) -> tuple[Device, Callable[[int], float]]:
    """Return this machine as the schedule sees it, and the bytes that training needs by cut."""
    config = terms.config
    alone = select_sites(config, (name,)) if len(site_names(config)) > 1 else config
    fleet = fleet_of(alone, terms.model, terms.ranks, (name,), [work])
    client = fleet.clients[0]

    def memory_at(cut: int) -> float:
        return client_memory(fleet.costs, client, cut).total

    return client.device, memory_at


def _device_numbers(device: Device, budget_gb: float | None) -> dict[str, float]:
    """Return a machine in the fields of `DeviceSpec`, with no more memory than the data owner gives."""
    return {
        "block_forward_ms_per_token": device.block_forward_s_per_token * 1e3,
        "block_backward_ms_per_token": device.block_backward_s_per_token * 1e3,
        "head_ms_per_token": device.head_s_per_token * 1e3,
        "memory_gb": min(device.memory_bytes / GB, budget_gb or MAX_DEVICE_NUMBER, MAX_DEVICE_NUMBER),
        **({"block_overhead_ms": device.block_overhead_s * 1e3} if device.block_overhead_s else {}),
    }
