"""Spans of Hugging Face causal language models: find the parts, load those that are held, run them."""

from splitft.model.checkpointing import checkpoint_blocks
from splitft.model.devices import CPU
from splitft.model.loss import (
    divergence,
    held_out_sums,
    loss_and_gradient,
    losses_and_gradients,
    sums_of_batches,
    token_losses,
)
from splitft.model.padding import pack, pad, pick
from splitft.model.segment import Segment
from splitft.model.source import Model, open_model

__all__ = [
    "CPU",
    "Model",
    "Segment",
    "checkpoint_blocks",
    "divergence",
    "held_out_sums",
    "loss_and_gradient",
    "losses_and_gradients",
    "open_model",
    "pack",
    "pad",
    "pick",
    "sums_of_batches",
    "token_losses",
]
