"""What a method does not admit, and what the keys that methods set need of each other.

    method: fedlora, clients.cuts: 3   ->   clients.cuts: found 3, but method fedlora keeps ...; give ...

What defines a method stands in `splitft.methods`; the rest are rules between sections, as in `config.run`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from splitft.methods import contradictions

if TYPE_CHECKING:
    from splitft.config.run import Conflict, RunConfig


def method_conflicts(config: RunConfig) -> list[Conflict]:
    """Everything about methods and their keys that does not fit together."""

    def value_of(key: str) -> Any:
        section, _, last = key.partition(".")
        return getattr(getattr(config, section), last)

    if said := contradictions(config.method, value_of):
        return [((key, "method"), message) for key, message in said]
    return [*_of_whole_models(config), *_of_turns(config), *_of_client_ranks(config)]


def _of_whole_models(config: RunConfig) -> list[Conflict]:
    found: list[Conflict] = []
    if config.clients.cuts == "whole":
        if config.split.labels == "server":
            message = "found server, but with clients.cuts whole nothing is on the server; give client"
            found.append((("split.labels", "clients.cuts"), message))
        if (controller := config.schedule.controller) != "fixed":
            message = f"found {controller}, but with clients.cuts whole there is no cut to choose; give fixed"
            found.append((("schedule.controller", "clients.cuts"), message))
        return found
    alone = "is for whole models; give clients.cuts: whole"
    if config.clients.pooled:
        found.append((("clients.pooled", "clients.cuts"), f"found true, which {alone}"))
    if not config.aggregate.federated:
        found.append((("aggregate.federated", "clients.cuts"), f"found false, which {alone}"))
    return found


def _of_turns(config: RunConfig) -> list[Conflict]:
    if config.training.order == "together":
        return []
    found: list[Conflict] = []
    if config.split.server_adapters != "shared":
        message = "found in-turn, which hands one model on; give split.server_adapters: shared"
        found.append((("training.order", "split.server_adapters"), message))
    if not isinstance(config.clients.cuts, int) or config.schedule.controller != "fixed":
        message = "found in-turn, which hands the same blocks to each client; give clients.cuts one number"
        found.append((("training.order", "clients.cuts"), message))
    if (rule := config.aggregate.rule) != "factors":
        message = f"found {rule}, but with training.order in-turn nothing is averaged; give factors"
        found.append((("aggregate.rule", "training.order"), message))
    if (stepping := config.aggregate.server_optimizer) != "none":
        message = f"found {stepping}, but with training.order in-turn nothing is averaged; give none"
        found.append((("aggregate.server_optimizer", "training.order"), message))
    if private := config.privacy.private_blocks:
        message = f"found {private}, but with training.order in-turn all blocks are handed on; give 0"
        found.append((("privacy.private_blocks", "training.order"), message))
    return found


def _of_client_ranks(config: RunConfig) -> list[Conflict]:
    ranks, count = config.lora.client_ranks, config.clients.count
    if ranks is None:
        return []
    found: list[Conflict] = []
    if isinstance(ranks, tuple) and len(ranks) != count:
        message = f"found {len(ranks)} ranks for {count} clients; give one a client"
        found.append((("lora.client_ranks", "clients.count"), message))
    if config.split.server_adapters != "per-client":
        message = "needs the server's adapters apart for each client; give split.server_adapters: per-client"
        found.append((("lora.client_ranks", "split.server_adapters"), message))
    if config.training.optimizer_state == "keep":
        message = "found keep, but factors of unequal ranks are cut anew each round; give reset"
        found.append((("training.optimizer_state", "lora.client_ranks"), message))
    return found
