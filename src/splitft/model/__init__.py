"""Spans of Hugging Face causal language models: find the parts, load those that are held, run them."""

from splitft.model.loss import divergence, loss_and_gradient, summed_loss, token_losses
from splitft.model.padding import pack, pad, pick
from splitft.model.segment import Segment
from splitft.model.source import Model, open_model

__all__ = [
    "Model",
    "Segment",
    "divergence",
    "loss_and_gradient",
    "open_model",
    "pack",
    "pad",
    "pick",
    "summed_loss",
    "token_losses",
]
