"""Record a real step of a run, byte by byte, and decode it as the server would.

    RunConfig, cut --prepare--> one client and the server on a tapped line --evaluate, train some steps-->
    frames (client, direction, bytes) --Terms--> Seen    and, for the judge alone, the tokens

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
"""Client, direction and bytes of one frame, as a line's tap is told."""


@dataclass(frozen=True)
class Recording:
    """What passed between one client and the server, and what the attacks are judged by."""

    seen: tuple[Observation, ...]
    """Batches that were trained on, as the server has them."""
    texts: tuple[tuple[int, ...], ...]
    """Tokens of each sequence in them: the truth, which no attack is given."""
    labels: tuple[tuple[int, ...], ...]
    """The labelled part of each."""
    loss: float
    """Held-out loss in nats per token before the recorded steps, with the defences on."""
    terms: MessageSerializer
    """What both sides agreed on."""
    adapters: AdapterState
    """Global adapters at the start of the round, which the server has."""


def recorded_config(config: RunConfig, cut: int, steps: int, batch_size: int) -> RunConfig:
    """The run with one client at this cut, for so many undivided steps of one round."""
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
    """Play and record a configuration of `recorded_config`, from these global adapters on.

    `private` are factors that the client alone has, by now other than the global ones of the same blocks.
    """
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
    result = simulation.evaluate()[client.name]
    simulation.start({client.name: RoundStart(round=1, cut=cut)})
    server.start(1, [client.name], start)
    simulation.train(1, [client.name], steps, lambda step: None)
    terms = prepared.serializer_of(client.name)
    seen = tuple(one for one in seen_in(frames, terms, config.seed) if one.training)
    batches = [gathered.clients[0].stream.batch(one.step) for one in seen]
    pairs = [
        pair
        for batch in batches
        for pair in zip(batch.tokens, batch.lengths, batch.labelled_from, strict=True)
    ]
    return Recording(
        seen=seen,
        texts=tuple(tuple(row[:length].tolist()) for row, length, _ in pairs),
        labels=tuple(tuple(row[first:length].tolist()) for row, length, first in pairs),
        loss=result.loss / max(1, result.tokens),
        terms=terms,
        adapters=start,
    )


def seen_in(frames: Iterable[Recorded], terms: MessageSerializer, seed: int = 0) -> list[Observation]:
    """Decode recorded frames as the server would, and put together what belongs to one batch."""
    ends: dict[str, CodecState] = {}
    underway: dict[str, Observation] = {}
    done: list[Observation] = []
    for client, _, data in frames:
        end = ends.setdefault(client, CodecState(seed, client))  # what codecs that learn have learnt so far
        message = terms.from_bytes(data, streams=end)
        if isinstance(message, Activations):
            if client in underway:
                done.append(underway.pop(client))
            underway[client] = Observation(
                client=client,
                step=message.step,
                training=message.training,
                lengths=message.lengths,
                labelled=message.labelled,
                hidden=message.hidden,
                labels=message.labels,
            )
        elif client in underway:
            underway[client] = _with(underway[client], message)
    return [*done, *underway.values()]


def as_it_travels(rows: torch.Tensor, terms: MessageSerializer) -> torch.Tensor:
    """Hidden states (N, D) as the server would decode them, by the run's own codec.

    A codec that learns as it goes is taken as in its first message, so its figures are lower bounds.
    """
    rounded = [
        terms.rounded(
            Activations(
                client="-",
                round=0,
                step=0,
                training=False,
                lengths=(len(part),),
                labelled=((0, len(part)),),
                hidden=part.to(terms.dtype),
                labels=torch.zeros(len(part), dtype=torch.int64) if terms.labels_travel else None,
            )
        )
        for part in torch.split(rows, terms.most_rows)
    ]
    return torch.cat([one.hidden.float() for one in rounded if isinstance(one, Activations)])


def _with(seen: Observation, message: Message) -> Observation:
    if isinstance(message, LastHidden):
        return replace(seen, last=message.hidden)
    if isinstance(message, HeadGradient):
        return replace(seen, head_gradient=message.gradient)
    if isinstance(message, CutGradient):
        return replace(seen, cut_gradient=message.gradient)
    return seen
