"""What client and server of a run agree on before the first message, in simulation as in deployment."""

from __future__ import annotations

import torch

from splitft.config import RunConfig
from splitft.model import Model
from splitft.protocol import MessageSerializer
from splitft.protocol.adapter_deltas import AXES_KEPT


def terms_of(config: RunConfig, model: Model) -> MessageSerializer:
    """The run's terms; both sides make them of the same configuration."""
    return MessageSerializer(
        width=model.shape.width,
        dtype=model.dtype,
        adapter_dtype=torch.promote_types(model.dtype, torch.float32),
        wire=config.wire,
        labels_travel=config.split.labels == "server",
        most_rows=most_rows(config),
        feedback=config.aggregate.rule in AXES_KEPT,
    )


def most_rows(config: RunConfig) -> int:
    """Padded tokens of the largest batch: one sequence may be longer than what a batch is filled to."""
    longest, training = config.data.max_tokens, config.training
    return max(longest, training.batch_tokens or training.batch_size * longest)
