"""What a run may ask for that is to be deployed, and why not the rest.

    configuration --check_deployable--> nothing, or DeployError: what was found, why it does not go, what does

Most of a configuration means the same wherever the clients are. What is refused needs all clients in one
place or in step, or a memory that a site would have to bring back after it was away.
"""

from __future__ import annotations

from collections.abc import Iterator

from splitft.codecs import codec_of
from splitft.codecs.error_feedback import Feedback
from splitft.config import RunConfig
from splitft.errors import DeployError
from splitft.specs.rules import RULES, rules_where
from splitft.specs.wire import AUTO

LEARNING = ("temporal", "principal")
"""Codecs whose two ends must remember the same."""


def check_deployable(config: RunConfig) -> None:
    """Raise DeployError, with every reason, if the run cannot be deployed."""
    if found := [*_of_one_place(config), *_of_memory(config), *_of_codecs(config)]:
        raise DeployError("; ".join(found))


def _of_one_place(config: RunConfig) -> Iterator[str]:
    """What needs all clients in one place, or in step."""
    if config.split.server_adapters != "per-client":
        yield (
            f"split.server_adapters: {config.split.server_adapters} needs all clients in step, and a "
            "deployed run never waits for a site that is away; give per-client"
        )
    for found, what in (
        (config.clients.pooled, "clients.pooled: the text of all clients in one place"),
        (config.training.order == "in-turn", "training.order: in-turn"),
        (
            config.clients.cuts == "whole",
            "clients.cuts: whole, by which clients step without a server,",
        ),
    ):
        if found:
            yield f"{what} is for simulation; a deployed run has no such thing yet"
    if config.wire.chooses:
        yield "wire: auto tries codecs on all clients' text in one place; name the codecs here"


def _of_memory(config: RunConfig) -> Iterator[str]:
    """What a site would have to keep, and bring back after it was away."""
    if not RULES[config.aggregate.rule].deployable:
        yield (
            f"aggregate.rule: {config.aggregate.rule} leaves a factor of its own with each client, and a "
            "site of a deployed run keeps none from one link to the next yet; give one of "
            + rules_where(lambda rule: rule.deployable)
        )
    if config.privacy.private_blocks:
        yield (
            "privacy.private_blocks: a site of a deployed run keeps no blocks of its own from one link to "
            "the next yet; give 0"
        )


def _of_codecs(config: RunConfig) -> Iterator[str]:
    """Codecs that remember what a line has carried."""
    in_flight = config.training.micro_batches > 1 and config.training.in_flight > 1
    for role in ("hidden", "gradient", "adapter"):
        codec = str(getattr(config.wire, role))
        if codec.startswith(LEARNING):
            yield (
                f"wire.{role}: {codec} learns on both ends of a line, and a site that comes back knows "
                "nothing of what was learnt; give another codec"
            )
        elif in_flight and role != "adapter" and codec != AUTO and isinstance(codec_of(codec), Feedback):
            yield (
                f"wire.{role}: {codec} makes good in a message what it left out of the last, and messages "
                "of several micro-batches in flight have no order; give training.in_flight: 1, or another "
                "codec"
            )
