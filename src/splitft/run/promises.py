"""What the first line of a run says of its privacy: what reaches the server, and what the defences guarantee.

configuration --received--> the kind of data    --run_promises--> guarantees    --audited--> what was read
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from splitft.config import RunConfig
from splitft.privacy.defence import promises
from splitft.privacy.known_leakage import audited_sentence
from splitft.run.setup import RunSetup
from splitft.schedule.workload import Fleet
from splitft.tracking.events import ClientInfo, Received


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


def audited(prepared: RunSetup) -> str:
    """Return the audit's finding for the run's setting, or "" if no hidden states leave the clients."""
    config, blocks = prepared.config, prepared.model.shape.blocks
    split = [facts.cut for facts in prepared.facts if facts.cut < blocks]
    if received(config, blocks) != "hidden" or not split:
        return ""
    cut, codec = min(split), str(config.wire.hidden)
    return audited_sentence(config.model.name, cut, codec, config.privacy, config.split.labels == "server")
