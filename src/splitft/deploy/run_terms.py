"""The terms of a deployed run: what a site and the server derive from its configuration before they talk.

RunConfig --load_run_terms--> RunTerms(model skeleton, rank policy, message serializer, size limits)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from splitft.config import RunConfig
from splitft.deploy.unsupported import check_deployable
from splitft.model import Model, open_model
from splitft.model.devices import RunDevices, take_devices
from splitft.protocol import MessageSerializer
from splitft.run.fleet import exact_sizes
from splitft.run.inputs import ranks_of
from splitft.run.run_mode import settled_alone
from splitft.run.setup import most_rows, serializer_of
from splitft.specs.codecs import kind_of
from splitft.training.ranks import RankPolicy

HEADER_BYTES = 2**21
"""Bytes allowed for the headers of a message."""
MAX_DEVICE_NUMBER = 1e9
"""Largest number in the description of a site's machine; stands for memory that nobody has limited."""
MIN_DEVICE_NUMBER = 1e-12
"""Smallest number in it, apart from 0: times that no machine reaches, and that do not vanish in products."""


@dataclass(frozen=True)
class RunTerms:
    """What both sides know before the first message."""

    config: RunConfig
    model: Model
    ranks: RankPolicy
    serializer: MessageSerializer
    frame_limit: int
    """Longest message of this run, in bytes."""
    batch_tokens: int
    """Most tokens of a batch, padding included."""
    devices: RunDevices = field(default_factory=RunDevices)
    """The devices that this party computes on."""


def load_run_terms(config: RunConfig) -> RunTerms:
    """Open the model and derive the terms. Raises DeployError if the run cannot be deployed."""
    config = settled_alone(config)
    check_deployable(config)
    here = config.devices.model_copy(update={"clients": config.devices.server})  # one party is here
    devices = take_devices(here)
    model = open_model(config.model, devices.every)
    ranks = ranks_of(config, model.shape.blocks, site_names(config))
    limit = _frame_limit(config, model, ranks)
    return RunTerms(config, model, ranks, serializer_of(config, model), limit, most_rows(config), devices)


def site_names(config: RunConfig) -> tuple[str, ...]:
    """Return all sites of the run, in the order of `clients.cuts`."""
    return config.deploy.sites or tuple(f"client-{n}" for n in range(1, config.clients.count + 1))


def select_sites(config: RunConfig, names: Sequence[str]) -> RunConfig:
    """Return the configuration reduced to some of the run's sites."""
    indices = [site_names(config).index(name) for name in names]

    def own(values: Any) -> Any:
        return tuple(values[index] for index in indices) if isinstance(values, tuple) else values

    clients, schedule, deploy = config.clients, config.schedule, config.deploy
    return config.model_copy(
        update={
            "clients": clients.model_copy(update={"count": len(indices), "cuts": own(clients.cuts)}),
            "schedule": schedule.model_copy(
                update={"devices": own(schedule.devices), "links": own(schedule.links), "changes": ()}
            ),
            "deploy": deploy.model_copy(update={"sites": tuple(names)}),
        }
    )


def _frame_limit(config: RunConfig, model: Model, ranks: RankPolicy) -> int:
    """Return the bytes of a batch's hidden states and of all adapters with moments, in fp64, and headers.

    A codec that learns also sends what it has learned: axes (D, D) in int8, and rows of facts.
    """
    batch = most_rows(config) * model.shape.width * 8
    adapter = config.lora.rank * exact_sizes(model, ranks).adapter_parameters_per_rank * model.shape.blocks
    learns = config.wire.chooses or any(
        kind_of(codec).learned for codec in (config.wire.hidden, config.wire.gradient)
    )
    learned = 2 * model.shape.width**2 if learns else 0
    return batch + 3 * 8 * adapter + learned + HEADER_BYTES
