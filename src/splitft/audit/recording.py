"""Record the frames of some real steps of a run, and decode them as the server would.

    RunConfig, cut --prepare--> one client and the server, on a recorded channel
                   --evaluate, train some steps--> frames (client, direction, bytes)
                   --MessageSerializer--> Observation        and the true tokens, for scoring only

Attacks get an `Observation`. The client is a `Client` like any other, with its defences, codec and optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from splitft.adapters import AdapterState
from splitft.audit.attacks import Observation
from splitft.config import RunConfig
from splitft.geometry import Span
from splitft.protocol import (
    Activations,
    CutGradient,
    HeadGradient,
    LastHidden,
    Message,
    MessageSerializer,
    RoundStart,
)
from splitft.protocol.channel import Direction
from splitft.protocol.codec_state import CodecState
from splitft.run.inputs import RunInputs
from splitft.run.setup import prepare
from splitft.specs import ClientsSpec, ScheduleSpec, SharesSpec

Recorded = tuple[str, Direction, bytes]
"""Client, direction and bytes of one frame, as a channel's tap gets them."""


@dataclass(frozen=True)
class Recording:
    """Observed batches of one client, and the true tokens that attacks are scored against."""

    batches: tuple[Observation, ...]
    """Batches that were trained on, as the server receives them."""
    texts: tuple[tuple[int, ...], ...]
    """True tokens of each sequence in them, which no attack is given."""
    labels: tuple[tuple[int, ...], ...]
    """The labelled part of each."""
    loss: float
    """Held-out loss in nats per token before the recorded steps, with the defences on."""
    serializer: MessageSerializer
    """Serializer of the client's messages, with the run's codecs."""


def recorded_config(config: RunConfig, cut: int, steps: int, batch_size: int) -> RunConfig:
    """Return the run with one client at this cut and one round of so many steps, without micro-batches."""
    training = {
        "rounds": 1,
        "steps": steps,
        "batch_size": batch_size,
        "participation": 1.0,
        "micro_batches": 1,
    }
    return config.model_copy(
        update={
            "method": "splitft",
            "clients": ClientsSpec(count=1, cuts=cut, shares=SharesSpec(by="iid")),
            "schedule": ScheduleSpec(),
            "training": config.training.model_copy(update={**training, "batch_tokens": None}),
            "wire": config.wire.model_copy(update={"in_process": "bytes"}),
        }
    )


def record(
    config: RunConfig,
    gathered: RunInputs,
    adapters: AdapterState | None = None,
    private: AdapterState | None = None,
) -> Recording:
    """Run and record a configuration of `recorded_config`, starting from these global adapters.

    `private` are the client's own factors, which replace the global ones of the same blocks.
    """
    # place the client and the server at the start of a round
    prepared = prepare(config, gathered)
    client, server = prepared.clients[0], prepared.server
    cut, steps = client.plan.cut, config.training.steps
    start = server.initial() if adapters is None else adapters
    frames: list[Recorded] = []
    simulation = prepared.simulation(lambda name, way, data: frames.append((name, way, data)))
    server.place({client.name: cut})
    server.install(start)
    own = start if private is None else start.updated(private)
    client.restore(cut, own.within(Span(0, cut)), 0, {})
    # evaluate and train, recording all frames
    simulation.evaluate()
    result = client.held_out.exact
    assert result is not None
    simulation.start({client.name: RoundStart(round=1, cut=cut)})
    server.start(1, [client.name], start)
    simulation.train(1, [client.name], steps, lambda step: None)
    # decode them, and look up the text of the same steps
    serializer = prepared.serializer_of(client.name)
    observed = tuple(one for one in observations(frames, serializer, config.seed) if one.training)
    batches = [gathered.clients[0].stream.batch(one.step) for one in observed]
    pairs = [
        pair
        for batch in batches
        for pair in zip(batch.tokens, batch.lengths, batch.labelled_from, strict=True)
    ]
    return Recording(
        batches=observed,
        texts=tuple(tuple(row[:length].tolist()) for row, length, _ in pairs),
        labels=tuple(tuple(row[first:length].tolist()) for row, length, first in pairs),
        loss=result.loss / max(1, result.tokens),
        serializer=serializer,
    )


def observations(
    frames: Iterable[Recorded], serializer: MessageSerializer, seed: int = 0
) -> list[Observation]:
    """Decode recorded frames as the server would, and group the messages of each batch."""
    states: dict[str, CodecState] = {}
    current: dict[str, Observation] = {}
    done: list[Observation] = []
    for client, _, data in frames:
        state = states.setdefault(client, CodecState(seed, client))
        message = serializer.from_bytes(data, state=state)
        if isinstance(message, Activations):
            if client in current:
                done.append(current.pop(client))
            current[client] = Observation(
                client=client,
                step=message.step,
                training=message.training,
                lengths=message.lengths,
                labelled=message.labelled,
                hidden=message.hidden,
                labels=message.labels,
            )
        elif client in current:
            current[client] = _with(current[client], message)
    return [*done, *current.values()]


def encoded_and_decoded(rows: torch.Tensor, serializer: MessageSerializer) -> torch.Tensor:
    """Encode hidden states (N, D) by the run's codec and return what the server would decode.

    A codec with state is used as for its first message, so the recovery of its settings is a lower bound.
    """
    rounded = [
        serializer.rounded(
            Activations(
                client="-",
                round=0,
                step=0,
                training=False,
                lengths=(len(part),),
                labelled=((0, len(part)),),
                hidden=part.to(serializer.dtype),
                labels=torch.zeros(len(part), dtype=torch.int64) if serializer.labels_travel else None,
            )
        )
        for part in torch.split(rows, serializer.most_rows)
    ]
    return torch.cat([one.hidden.float() for one in rounded if isinstance(one, Activations)])


def _with(batch: Observation, message: Message) -> Observation:
    if isinstance(message, LastHidden):
        return replace(batch, last=message.hidden)
    if isinstance(message, HeadGradient):
        return replace(batch, head_gradient=message.gradient, mean_loss=message.loss)
    if isinstance(message, CutGradient):
        return replace(batch, cut_gradient=message.gradient)
    return batch
