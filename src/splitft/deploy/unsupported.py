"""The settings that cannot be deployed, each with the reason and what to give instead.

    RunConfig --check_deployable--> nothing, or DeployError with every reason

Most settings mean the same in simulation and in deployment. Those below need all clients in one place or one
after the other, or messages in an order that they do not have. Facts about rules and codecs stand in
`splitft.specs.rules` and `splitft.specs.codecs`.
"""

from __future__ import annotations

from splitft.config import RunConfig
from splitft.config.compatibility import Requirement
from splitft.errors import DeployError
from splitft.specs.codecs import ROLES, kind_of
from splitft.specs.wire import AUTO


def check_deployable(config: RunConfig) -> None:
    """Raise DeployError, with every reason, if the run cannot be deployed."""
    found = [conflict for one in UNSUPPORTED for conflict in one.conflicts(config)]
    if found:
        raise DeployError("; ".join(f"{keys[0]}: {message}" for keys, message in found))


def _unordered_codecs(config: RunConfig) -> dict[str, str]:
    """Return the codecs that remember earlier messages where those of a step have no order, by role."""
    if min(config.training.micro_batches, config.training.in_flight) == 1:
        return {}
    codecs = {role: str(getattr(config.wire, role)) for role in ROLES if role != "adapter"}
    return {
        role: codec for role, codec in codecs.items() if codec != AUTO and kind_of(codec).memory != "none"
    }


# fmt: off
UNSUPPORTED = (
    Requirement(("clients.pooled",), lambda c: c.clients.pooled,
        "true puts the text of all clients in one place, which is for simulation; give false"),
    Requirement(("training.order",), lambda c: c.training.order == "in-turn",
        "in-turn is for simulation; give together"),
    Requirement(("split.turns",),
        lambda c: c.split.server_adapters == "shared-in-turn" and c.split.turns == "fixed",
        "fixed lets every site wait for those before it, present or not; a deployed run takes batches in "
        "their order of arrival; give random"),
    Requirement(("training.steps_by",), lambda c: c.training.steps_by == "time",
        "time goes by the simulated clock, and a deployed run holds every site to one number of steps; give "
        "count"),
    Requirement(("aggregate.federated",), lambda c: not c.aggregate.federated,
        "false lets every client train for itself, which needs no server; give true, or train at each site"),
    Requirement(("wire.{index}",), _unordered_codecs,
        "{found} goes on from earlier messages, and messages of micro-batches in flight have no order; give "
        "training.in_flight: 1, or another codec"),
)
# fmt: on
