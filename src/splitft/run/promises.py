"""The first event of a run, and what it says of privacy: what reaches the server, what defences guarantee.

configuration --received--> the kind of data    --run_promises--> guarantees    --audited--> what was read
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from splitft.config import RunConfig
from splitft.privacy.defence import promises
from splitft.privacy.known_leakage import audited_sentence
from splitft.schedule.workload import Fleet
from splitft.tracking.events import ClientInfo, Received, RunStarted
from splitft.version import __version__


def run_started(config: RunConfig, blocks: int, facts: tuple[ClientInfo, ...]) -> RunStarted:
    """Return the first event of a run with these clients, as far as configuration and L `blocks` tell it."""
    return RunStarted(
        version=__version__,
        method=config.method,
        seed=config.seed,
        model=config.model.name,
        blocks=blocks,
        rounds=config.training.rounds,
        steps=config.training.steps,
        labels=config.split.labels,
        received=received(config, blocks),
        audited=audited(config, blocks, facts),
        clients=facts,
    )


def received(config: RunConfig, blocks: int) -> Received:
    """Return the kind of data that the server receives, by where the L `blocks` and the text are."""
    if config.clients.pooled:
        return "text"
    if not config.aggregate.federated:
        return "nothing"
    stay_whole = not config.schedule.adaptive and set(config.cuts or ()) == {blocks}
    return "adapters" if config.clients.cuts == "whole" or stay_whole else "hidden"


def run_promises(
    config: RunConfig, fleet: Fleet, facts: Sequence[ClientInfo], width: int, longest: int
) -> tuple[str, ...]:
    """Return the promises of the run's defences for the text that is sent most often.

    A training text is sent once an epoch, a held-out one in every evaluation. `longest` is a text's length.
    """
    training, evaluations = config.training, config.training.rounds + 1
    sequences = {one.name: one.workload.sequences for one in fleet.clients}
    epochs = [
        training.rounds * training.steps * sequences[one.name] / max(1, one.train_examples) for one in facts
    ]
    times_sent = max(evaluations, *map(math.ceil, epochs))
    return tuple(promises(config.privacy, width, longest, times_sent, evaluations))


def audited(config: RunConfig, blocks: int, facts: Sequence[ClientInfo]) -> str:
    """Return the audit's finding for the run's setting, or "" if no hidden states leave the clients."""
    split = [one.cut for one in facts if one.cut < blocks]
    if received(config, blocks) != "hidden" or not split:
        return ""
    cut, codec = min(split), str(config.wire.hidden)
    return audited_sentence(config.model.name, cut, codec, config.privacy, config.split.labels == "server")
