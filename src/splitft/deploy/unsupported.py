"""The settings that cannot be deployed, each with the reason and what to give instead.

    RunConfig --check_deployable--> nothing, or DeployError with every reason

Most settings mean the same in simulation and in deployment. Those below need all clients in one place or in
step, or a memory that a site would have lost when it returns. Facts about rules and codecs stand in
`splitft.specs.rules` and `splitft.specs.codecs`.
"""

from __future__ import annotations

from splitft.config import RunConfig
from splitft.config.compatibility import Requirement
from splitft.errors import DeployError
from splitft.specs.codecs import ROLES, kind_of
from splitft.specs.rules import RULES, rules_where
from splitft.specs.wire import AUTO


def check_deployable(config: RunConfig) -> None:
    """Raise DeployError, with every reason, if the run cannot be deployed."""
    found = [conflict for one in UNSUPPORTED for conflict in one.conflicts(config)]
    if found:
        raise DeployError("; ".join(f"{keys[0]}: {message}" for keys, message in found))


def _codecs_with_memory(config: RunConfig, memory: str) -> dict[str, str]:
    """Return the codecs of a run that must remember earlier messages, by role."""
    codecs = {role: str(getattr(config.wire, role)) for role in ROLES}
    return {
        role: codec for role, codec in codecs.items() if codec != AUTO and kind_of(codec).memory == memory
    }


def _unordered_codecs(config: RunConfig) -> dict[str, str]:
    """Return the codecs that need ordered messages where those of a step have no order."""
    if min(config.training.micro_batches, config.training.in_flight) == 1:
        return {}
    found = _codecs_with_memory(config, "sender")
    return {role: codec for role, codec in found.items() if role != "adapter"}


# fmt: off
UNSUPPORTED = (
    Requirement(("split.server_adapters",),
        lambda c: c.split.server_adapters if c.split.server_adapters != "per-client" else "",
        "{found} needs all clients in step, and a deployed run waits for no absent site; give per-client"),
    Requirement(("clients.pooled",), lambda c: c.clients.pooled,
        "true puts the text of all clients in one place, which is for simulation; give false"),
    Requirement(("training.order",), lambda c: c.training.order == "in-turn",
        "in-turn is for simulation; give together"),
    Requirement(("clients.cuts",), lambda c: c.clients.cuts == "whole",
        "whole lets clients train without a server, which is for simulation; give numbers or auto"),
    Requirement(("wire",), lambda c: c.wire.chooses,
        "auto tries codecs on the text of all clients in one place; name the codecs"),
    Requirement(("aggregate.rule",), lambda c: "" if RULES[c.aggregate.rule].deployable else c.aggregate.rule,
        lambda c: "{found} leaves factors of its own with each client, and a site keeps none between "
        "sessions; give one of " + rules_where(lambda rule: rule.deployable)),
    Requirement(("privacy.private_blocks",), lambda c: c.privacy.private_blocks,
        "found {found}, but a site keeps no blocks of its own between sessions; give 0"),
    Requirement(("wire.{index}",), lambda c: _codecs_with_memory(c, "both"),
        "{found} learns on both ends, and a site that returns has lost what it learned; give another codec"),
    Requirement(("wire.{index}",), _unordered_codecs,
        "{found} adds to a message what it left out of the last, and messages of micro-batches in flight "
        "have no order; give training.in_flight: 1, or another codec"),
)
# fmt: on
